"""Batches of the store for this process, read ahead by a thread."""

import copy
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from imagen_core.diffusion import PriorConfig
from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.store import Crop, FullImage, Store, View
from imagen_core.store.read.loader import Loader
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.records import EmbeddingGroup
from imagen_core.train.augment import Flipped, RandomResizedCrop
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.online import Encode, with_text
from imagen_core.train.data.randomness import RandomStream, SampleColumn, sample_uniform
from imagen_core.train.errors import TrainError
from imagen_core.train.parallel.world import World

_AHEAD = 3  # batches read while a step runs
_SHARDS_TO_CHECK = 16  # for annotations


@dataclass(frozen=True, slots=True)
class Batch:
    """This process's part of a global batch.

    Attributes:
        raw: a batch of the store's loader.
        counters: how many samples were consumed before each of these; decide their random numbers.
        global_size: samples of the batch over all processes.
        largest_part: most samples of the batch that any process has.
        loader_state: where the loader is once this batch is consumed.
    """

    raw: Mapping[str, Any]
    counters: range
    global_size: int
    largest_part: int
    loader_state: dict[str, Any]

    @property
    def keys(self) -> list[str]:
        return self.raw["keys"]

    @property
    def images(self) -> dict[int, Tensor]:
        """uint8 (b, 3, s, s) by size; empty where no images are read."""
        return self.raw.get("images", {})

    def part(self, start: int, stop: int) -> "Batch":
        """The rows from `start` to `stop`."""
        rows = slice(start, stop)
        raw = {
            name: {key: t[rows] for key, t in value.items()} if isinstance(value, dict) else value[rows]
            for name, value in self.raw.items()
        }
        return replace(self, raw=raw, counters=self.counters[rows])


def open_store(config: TrainConfig, *, online: bool = False) -> Store:
    """The store, with everything the configuration reads.

    Args:
        online: captions are encoded in the training loop, so `text` need not be in the store.
    Raises:
        TrainError: a size or an encoder is missing, or has another width.
        StoreError: there is no readable store.
    """
    store = Store.open(config.store, cache_dir=config.data.cache_dir, cache_bytes=config.data.cache_bytes)
    for size in stored_sizes(config):
        if size not in store.image_sizes:
            raise TrainError(
                f"store {config.store}: has no images-{size} (sizes: {store.image_sizes}); add the size with "
                "`pipeline run precompute` and images.sizes_px, or change denoiser.size_px, low_res_px or "
                "views.resized_crop.from_px"
            )
    network = config.denoiser.network
    if isinstance(network, PriorNetworkConfig):
        image_dim, where, embed_option = network.dim, "denoiser.network", "denoiser.network.dim"
    else:
        image_dim, where = network.image_embed_dim, "denoiser.unet"
        embed_option = f"{where}.image_embed_dim"
    text = None if online else config.text
    _check_encoder("text", text, store.manifest.texts, network.text_dim, f"{where}.text_dim")
    _check_one_vector(store, config.text_embed)
    _check_encoder("text_embed", config.text_embed, store.manifest.texts, image_dim, embed_option)
    _check_encoder("image_embed", config.image_embed, store.manifest.image_embeds, image_dim, embed_option)
    if config.transcription is not None:
        _check_annotation("transcription", store, config, "denoiser.unet.transcription")
    if config.num_classes is not None:
        _check_annotation("label", store, config, "denoiser.unet.num_classes")
    count = config.validation.num_samples
    if len(store) <= count:
        raise TrainError(f"validation.num_samples is {count}, but the store has {len(store)} samples")
    chosen, end = training_samples(store, config), len(store) - count
    if not (0 <= chosen.start < chosen.stop <= end):
        raise TrainError(
            f"data.samples: [{chosen.start}, {chosen.stop}] is no part of the {end} samples that are not for "
            "validation"
        )
    return store


def training_samples(store: Store, config: TrainConfig) -> range:
    """Indices in the store of the samples to train on."""
    return range(*(config.data.samples or (0, len(store) - config.validation.num_samples)))


def _check_encoder(
    field: str, encoder: str | None, groups: Mapping[str, EmbeddingGroup], dim: int | None, option: str
) -> None:
    """Refuses an encoder that the store lacks, or whose embeddings have another width than `option`."""
    if encoder is None:
        return
    if encoder not in groups:
        kind = "image encoder" if field == "image_embed" else "encoder"
        raise TrainError(f"{field}: the store has no {kind} {encoder!r} ({kind}s: {sorted(groups)})")
    if groups[encoder].dim != dim:
        raise TrainError(
            f"{option} is {dim}, but the embeddings of {encoder!r} in the store are {groups[encoder].dim} wide; set "
            f"{option}={groups[encoder].dim}"
        )


def _check_one_vector(store: Store, encoder: str | None) -> None:
    """Refuses an encoder of tokens as `text_embed`, by the first shards."""
    if encoder is None or encoder not in store.manifest.texts:
        return  # refused by name
    for shard in range(min(_SHARDS_TO_CHECK, store.manifest.num_shards)):
        most = max(store.shard(shard).text[encoder].num_tokens, default=1)
        if most != 1:
            raise TrainError(
                f"text_embed: {encoder!r} has {most} vectors per caption; name an encoder of one, such as "
                f"kind=clip with output=projected (encoders in the store: {sorted(store.manifest.texts)})"
            )


def _check_annotation(field: str, store: Store, config: TrainConfig, option: str) -> None:
    """Refuses a store without what the model reads because of `option`, by its first shards."""
    for shard in range(min(_SHARDS_TO_CHECK, store.manifest.num_shards)):
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


def full_images(config: TrainConfig) -> View:
    """Images as they are, of the sizes of a batch."""
    if config.views.resized_crop is None:
        return FullImage()
    settings = config.views.resized_crop.model_copy(update={"probability": 0.0, "without_text": None})
    return RandomResizedCrop(settings, lambda counters: np.zeros((len(counters), 4)))


def random_views(config: TrainConfig) -> View:
    """What training sees of an image: a function of the sample's random numbers."""
    settings = config.views

    def columns(counters: Sequence[int], *wanted: SampleColumn) -> np.ndarray:
        numbers = sample_uniform(config.seed, counters, RandomStream.SAMPLE, len(SampleColumn))
        return numbers.numpy()[:, list(wanted)]

    def place(counters: Sequence[int]) -> np.ndarray:
        return columns(counters, SampleColumn.CROP_TOP, SampleColumn.CROP_LEFT)

    def whether_area_and_place(counters: Sequence[int]) -> np.ndarray:
        whether_and_area = sample_uniform(config.seed, counters, RandomStream.RESIZED_CROP, count=2).numpy()
        return np.concatenate([whether_and_area, place(counters)], axis=1)

    view: View = FullImage()
    if settings.resized_crop is not None:
        view = RandomResizedCrop(settings.resized_crop, whether_area_and_place)
    elif settings.crop_px is not None:
        view = Crop(settings.crop_px, place)
    if settings.horizontal_flip:
        view = Flipped(view, settings.horizontal_flip, lambda counters: columns(counters, SampleColumn.FLIP))
    return view


def loader_options(config: TrainConfig, batch_size: int, *, online: bool) -> LoaderOptions:
    """What a run reads of each sample; the caller sets the order. `online`: captions, not their embeddings."""
    return LoaderOptions(
        batch_size,
        images=needed_sizes(config) or None,
        text=None if online else config.text,
        captions=online,
        text_embed=config.text_embed,
        image_embed=config.image_embed,
        max_tokens=config.max_tokens,
        transcriptions=config.transcription is not None,
        labels=config.num_classes is not None,
    )


def read_batches(loader: Loader, config: TrainConfig, encode: Encode | None) -> Iterator[Mapping[str, Any]]:
    """One epoch of a loader of `loader_options`, with the embeddings of the captions where `encode` makes them."""
    for raw in loader:
        yield with_text(raw, encode, config)


class BatchStream:
    """An endless stream of training batches; a thread reads the next ones while a step runs.

    Captions are encoded, where `encode` is given, by the thread that takes the batch.
    """

    def __init__(
        self,
        store: Store,
        config: TrainConfig,
        world: World,
        state: dict[str, Any] | None,
        encode: Encode | None = None,
    ):
        self._config, self._world, self._encode = config, world, encode
        if config.batch_size % world.size:
            raise TrainError(f"batch_size {config.batch_size} must be a multiple of the {world.size} processes")
        options = replace(
            loader_options(config, config.batch_size // world.size, online=encode is not None),
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            samples=training_samples(store, config),
            crop=random_views(config),
            shuffle_window_shards=config.data.shuffle_window_shards,
            pin_memory=world.device.type == "cuda",
        )
        self._loader = Loader(copy.copy(store), options)  # a copy opens its own files, for the reading thread
        if state is not None:
            try:
                self._loader.load_state_dict(state)
            except ValueError as error:
                raise TrainError(
                    f"the checkpoint's place in the data does not fit: {error}; store, seed and "
                    "data.samples must stay the same, or start again in another --out"
                ) from error
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batches", daemon=True)
        self._thread.start()
        self.waited_s = 0.0
        """Time the training has spent waiting for batches."""

    def next(self) -> Batch:
        """The next batch; raises what reading it raised."""
        started = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return replace(item, raw=with_text(item.raw, self._encode, self._config))

    def close(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _read_ahead(self) -> None:
        try:
            while not self._stopped.is_set():
                for batch in self._epoch():
                    self._queue.put(batch)
                    if self._stopped.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - handed to the training loop, which raises it
            self._queue.put(error)

    def _epoch(self) -> Iterator[Batch]:
        before = self._loader.state_dict()
        for raw in self._loader:
            after = self._loader.state_dict()
            samples = after["num_samples"]
            start = before["epoch"] * samples + before["position"]
            size = after["epoch"] * samples + after["position"] - start
            first = self._world.rank * size // self._world.size
            before = after
            if not self._loader.global_size:  # all of its samples were removed from the store
                continue
            yield Batch(
                raw,
                range(start + first, start + first + len(raw["keys"])),
                self._loader.global_size,
                -(-size // self._world.size),
                after,
            )
