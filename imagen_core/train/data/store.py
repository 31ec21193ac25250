"""The store of a training: opened with everything the training reads, and opened again once it has changed."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from imagen_core.conditions import ConditionError
from imagen_core.diffusion import DenoiserConfig, PriorConfig
from imagen_core.far import StorageError
from imagen_core.store import (
    MANIFEST_NAME,
    REMOVED,
    SAMPLES_GROUP,
    Manifest,
    Store,
    StoreError,
    StoreFolder,
    revision_of,
)
from imagen_core.store.buckets import Shape, ratios_of, scaled, shapes_difference
from imagen_core.store.errors import ADVICE
from imagen_core.store.read.loader import Loader
from imagen_core.store.read.mixture_loader import MixtureLoader
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.records import EmbeddingGroup
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.store_encoders import SHARDS_TO_CHECK, check_encoders
from imagen_core.train.data.store_images import check_condition_images, check_features
from imagen_core.train.errors import StoreLostError, TrainError
from imagen_core.train.parallel.world import World

log = logging.getLogger(__name__)
MAX_OPEN_SHARDS = 64
"""Shards that a training keeps open, of all its stores together."""


def open_store(
    config: TrainConfig,
    *,
    online: bool = False,
    max_open_shards: int = MAX_OPEN_SHARDS,
    before: Store | None = None,
) -> Store:
    """The store of a training with one, with everything the configuration reads, of the samples that `where` chooses.

    Args:
        online: captions are encoded in the training loop, so `text` need not be in the store.
        max_open_shards: shards whose files are kept open.
        before: the same store as it was opened before, whose chosen samples are taken.
    Raises:
        TrainError: a size or an encoder is missing, or has another width.
        StoreError: there is no readable store.
        StoreLostError: its files cannot be reached.
    """
    assert config.store is not None
    store = _opened(config.store, config, max_open_shards)
    for size in stored_sizes(config):
        if size not in store.image_sizes:
            raise TrainError(
                f"store {config.store}: has no images-{size} (sizes: {store.image_sizes}); add the size with "
                "`pipeline run precompute` and images.sizes_px, or change denoiser.size_px, low_res_px or "
                "views.resized_crop.from_px"
            )
    _check_shapes(store, config)
    check_encoders(store, config, online=online)
    check_condition_images(store, config)
    check_features(store, config)
    if config.transcription is not None:
        _check_annotation("transcription", store, config, "denoiser.unet.transcription")
    if config.num_classes is not None:
        _check_annotation("label", store, config, "denoiser.unet.num_classes")
    store = _chosen(store, config, before)
    count = config.validation.num_samples
    if len(store) <= count:
        chosen = "" if config.where is None else f" for which where={config.where!r} is true"
        raise TrainError(f"validation.num_samples is {count}, but the store has {len(store)} samples{chosen}")
    chosen, end = training_samples(store, config), len(store) - count
    if not (0 <= chosen.start < chosen.stop <= end):
        raise TrainError(
            f"data.samples: [{chosen.start}, {chosen.stop}] is no part of the {end} samples that are not for "
            "validation"
        )
    return store


def _opened(place: str, config: TrainConfig, max_open_shards: int) -> Store:
    data = config.data
    try:
        return Store.open(
            place, cache_dir=data.cache_dir, cache_bytes=data.cache_bytes, max_open_shards=max_open_shards
        )
    except StorageError as error:
        raise StoreLostError(str(error), again=error.passes) from error
    except OSError as error:
        raise StoreLostError(f"store {place}: cannot be read ({error})", again=_passes(error)) from error


def _chosen(store: Store, config: TrainConfig, before: Store | None) -> Store:
    if config.where is None:
        return store
    if before is not None and np.array_equal(store.manifest.rows, before.manifest.rows):
        return store.where_as(before)
    try:
        return store.where(config.where)
    except (ConditionError, ImportError) as error:
        raise TrainError(str(error)) from error


def trained_shapes(store: Store, config: TrainConfig) -> list[Shape]:
    """Height and width of the images that the network sees in training, one for each aspect-ratio bucket.

    Raises:
        TrainError: the images of a bucket have no whole number of pixels in the size trained on.
    """
    if not isinstance(config.denoiser, DenoiserConfig):
        return []
    stored_px = stored_sizes(config)[0]
    stored = store.image_group(stored_px).shapes
    if config.views.crop_px is not None or not stored:
        return [(config.side_px, config.side_px)]
    try:
        return [*scaled(stored, stored_px, config.denoiser.size_px)]
    except ValueError as error:
        raise TrainError(f"views.resized_crop.from_px is {stored_px}: {error}") from error


def _check_shapes(store: Store, config: TrainConfig) -> None:
    """Refuses a store whose aspect-ratio buckets do not fit the model, or the crops."""
    groups = [store.image_group(size) for size in stored_sizes(config)]
    if len({ratios_of(group.shapes) for group in groups}) > 1:
        first, second = groups
        raise TrainError(
            f"store {config.store}: {first.name} and {second.name} are not of the same aspect-ratio buckets, so they "
            f"do not show the same part of an image ({shapes_difference(first.shapes, second.shapes)}); make both "
            "sizes in one run"
        )
    shapes, crop_px = trained_shapes(store, config), config.views.crop_px
    narrowest = min((side for group in groups[:1] for shape in group.shapes for side in shape), default=crop_px)
    if crop_px is not None and narrowest is not None and crop_px > narrowest:
        raise TrainError(
            f"views.crop_px {crop_px} is larger than a side of an aspect-ratio bucket of the store, {narrowest} px; "
            "take smaller crops"
        )
    if isinstance(config.denoiser, DenoiserConfig):
        divisor = config.denoiser.unet.sides_divisor
        bad = next((shape for shape in shapes if shape[0] % divisor or shape[1] % divisor), None)
        if bad is not None:
            raise TrainError(
                f"denoiser.unet needs sides that are multiples of {divisor} px, but images of an aspect-ratio bucket "
                f"of the store {config.store} are {bad[0]} x {bad[1]} px; take a model with fewer levels, or a store "
                "with images.aspect=square"
            )


def training_samples(store: Store, config: TrainConfig) -> range:
    """Indices in the store of the samples to train on."""
    return range(*(config.data.samples or (0, len(store) - config.validation.num_samples)))


def make_loader(
    stores: Mapping[str, Store], config: TrainConfig, options: LoaderOptions, samples: Mapping[str, range]
) -> Loader | MixtureLoader:
    """A loader of these samples of the store, or of the mixture of the stores."""
    if config.store is not None:
        ((name, store),) = stores.items()
        return Loader(store, replace(options, samples=samples[name]))
    captions = {name: one.captions for name, one in config.by_store().items() if one.captions is not None}
    return MixtureLoader(stores, config.weights, options, samples, captions)


def validation_samples(store: Store, config: TrainConfig) -> range:
    """Indices in the store of the samples that are kept out of training."""
    return range(len(store) - config.validation.num_samples, len(store))


def _check_annotation(field: str, store: Store, config: TrainConfig, option: str) -> None:
    """Refuses a store without what the model reads because of `option`, by its first shards."""
    for shard in range(min(SHARDS_TO_CHECK, store.manifest.num_shards)):
        if any(value is not None for value in store.shard(shard).samples.column(field)):
            return
    raise TrainError(
        f"{option}: the store {config.store} has no {field}s; name their column with `pipeline run precompute` and "
        f"source.{field}_column, or set {option}=null"
    )


def needed_sizes(config: TrainConfig) -> list[int]:
    """Sizes of the images of a batch; none for a prior."""
    if isinstance(config.denoiser, PriorConfig):
        return []
    sizes = (config.denoiser.size_px, config.denoiser.low_res_px)
    return [size for size in sizes if size is not None]


def stored_sizes(config: TrainConfig) -> list[int]:
    """Sizes of the images a run reads."""
    return needed_sizes(config) if config.views.resized_crop is None else [config.views.resized_crop.from_px]


class UnreadableError(Exception):
    """A process could not read the store; raised on all processes at the same place.

    Attributes:
        error: what this process met; None on the others.
    """

    def __init__(self, error: Exception | None) -> None:
        super().__init__(str(error))
        self.error = error


def agree(world: World, errors: Sequence[Exception]) -> None:
    """Raises UnreadableError on all processes if one of them has an error; all must call it."""
    if any(world.gather(bool(errors))):
        raise UnreadableError(errors[0] if errors else None)


def opened_again(
    stores: Mapping[str, Store], config: TrainConfig, error: Exception, *, online: bool
) -> dict[str, Store]:
    """The stores as they are now, if one was compacted, or made again with the same samples, since it was opened.

    Args:
        stores: by name, as `TrainConfig.by_store` names them.
        error: what reading them raised.
    Raises:
        StoreLostError: they are the same as before, or one is not finished, or has other samples.
    """
    each = config.by_store()
    now = {name: _opened_now(store, each[name], error, online=online) for name, store in stores.items()}
    if all(now[name] is store for name, store in stores.items()):
        raise StoreLostError(_words(error), again=_passes(error)) from error
    return now


def _opened_now(store: Store, config: TrainConfig, error: Exception, *, online: bool) -> Store:
    """A store as it is now; the same object if nothing was changed."""
    assert config.store is not None
    try:
        now = open_store(config, online=online, max_open_shards=store.max_open_shards, before=store)
    except StoreLostError as reason:
        raise reason from error
    except StoreError as reason:
        unfinished = not _has_manifest(config.store)
        why = "it is gone, or is being made again" if unfinished else _words(reason)
        raise StoreLostError(why, again=unfinished) from error
    except TrainError as reason:
        raise StoreLostError(f"it was made again: {reason}", again=False) from error
    before, after = store.manifest, now.manifest
    if (before.sha256, before.num_removals) == (after.sha256, after.num_removals):
        return store
    if difference := _difference(before, after, config):
        raise StoreLostError(f"it was made again with other content: {difference}", again=False) from error
    log.warning(
        "store %s: was compacted or made again while it was read; the training goes on with it as it is now, in the "
        "same order",
        config.store,
    )
    return now


def store_lost(error: Exception | None, config: TrainConfig, step: int, world: World) -> StoreLostError:
    """The error with which a training ends that cannot read its store; all processes must call it.

    Args:
        error: what this process met; None on the others.
        step: of the newest checkpoint.
    """
    mine = None if error is None else (_words(error), error.again if isinstance(error, StoreLostError) else False)
    words, again = next(found for found in world.gather(mine) if found is not None)
    places = [str(one.store) for one in config.by_store().values()]
    which, them = ("store", "it") if len(places) == 1 else ("stores", "them")
    saved = f"the checkpoint of step {step:,} is saved" if step else "no step was made yet"
    remedy = (
        ""
        if again
        else f" check {them} with `pipeline verify {' '.join(places)}`, put back what is damaged from a copy, and"
    )
    then = "run the same command again to " + ("go on from there" if step else "begin")
    return StoreLostError(
        f"{which} {', '.join(places)}: cannot be read any more: {words}; {saved};{remedy} {then}",
        again=again,
    )


def _has_manifest(place: str) -> bool:
    try:
        return StoreFolder(place).exists(MANIFEST_NAME)
    except (OSError, StorageError):
        return True


def _passes(error: Exception) -> bool:
    """Whether an error may pass by itself."""
    return error.passes if isinstance(error, StorageError) else isinstance(error, ConnectionError | TimeoutError)


def _words(error: Exception) -> str:
    """An error without the advice to make the store again, which a training must not give."""
    text = str(error).removesuffix(f"; {ADVICE}")
    return text if isinstance(error, StoreError | StoreLostError | StorageError) else f"{type(error).__name__}: {text}"


def _difference(before: Manifest, after: Manifest, config: TrainConfig) -> str | None:
    """Why a training cannot go on in the same order with the same data; None if it can."""
    if not (np.array_equal(before.index, after.index) and np.array_equal(before.rows, after.rows)):
        return (
            f"{after.num_rows:,} rows in {after.num_shards:,} shards, not {before.num_rows:,} in {before.num_shards:,}"
        )
    if after.num_removals < before.num_removals:
        return f"{after.num_removals} removals, not {before.num_removals}"
    groups = [SAMPLES_GROUP, *(group.name for name, group in before.captions.items() if name in after.captions)]
    for group, position in itertools.product(groups, range(before.num_shards)):
        old, new = before.file(group, position), after.file(group, position)
        if old is None or new is None or old.sha256 == new.sha256:
            continue
        # Compaction writes files with removed rows again, under a later revision; the rows stay where they are.
        erased = REMOVED in after.excluded.get(position, {}).values() and revision_of(new.path) > revision_of(old.path)
        if not erased:
            return f"{new.path} holds other {'samples' if group == SAMPLES_GROUP else 'captions'}"
    for size in stored_sizes(config):
        if before.images[size].config != after.images[size].config:
            return f"images-{size} are resized in another way"
    for names, old, new in (
        ((*config.texts, config.text_embed), before.texts, after.texts),
        ((config.image_embed,), before.image_embeds, after.image_embeds),
    ):
        for name in names:
            if name is not None and name in old and _made_by(old[name]) != _made_by(new[name]):
                return f"{old[name].name} is by another encoder"
    features = [] if config.alignment is None else [config.alignment.encoder]
    for name in (*config.condition_images, *features):
        old, new = before.arrays[name], after.arrays[name]
        if (old.spec, old.fingerprint) != (new.spec, new.fingerprint):
            return f"{old.name} is made in another way"
    return None


def _made_by(group: EmbeddingGroup) -> tuple[object, ...]:
    return group.dim, group.dtype, group.fingerprint
