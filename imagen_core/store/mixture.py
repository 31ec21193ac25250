"""Several stores that are read as one, each with a share."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from imagen_core.differences import changed_fields
from imagen_core.store.buckets import ratios_of, shapes_difference
from imagen_core.store.encoder_identity import comparable_records
from imagen_core.store.probe import record_probe_differences
from imagen_core.store.read.crop import FullImage
from imagen_core.store.read.options import LoaderOptions, takes_options_of
from imagen_core.store.read.quota import Quota
from imagen_core.store.store import Store

if TYPE_CHECKING:
    from imagen_core.store.read.mixture_loader import MixtureLoader

log = logging.getLogger(__name__)


class Mixture:
    """Stores by name, each with a weight: its share of the samples is its weight divided by the sum of all weights.

    A store of weight 0 is compared with the others, and not read.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        weights: Mapping[str, float],
        samples: Mapping[str, range] | None = None,
        caption_sets: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """
        Args:
            weights: of each store, by its name: 0 or more.
            samples: indices to read of a store, a range of step 1; all of a store that is not named.
            caption_sets: weights of the sets of captions of a store, by its name; of a store that is not named those
                of `LoaderOptions.caption_sets`.
        Raises:
            ValueError: names differ, a weight is negative or not finite, or all weights are 0.
        """
        named = (samples or {}).keys() | (caption_sets or {}).keys()
        if stores.keys() != weights.keys() or not named <= stores.keys():
            raise ValueError(
                f"weights, samples and caption_sets must name the stores {', '.join(stores)} (got "
                f"{', '.join(weights)}; {', '.join(sorted(named))})"
            )
        Quota(list(weights.values()))
        self.stores, self.weights, self.samples = dict(stores), dict(weights), dict(samples or {})
        self.caption_sets = dict(caption_sets or {})

    @property
    def shares(self) -> dict[str, float]:
        """The part of the samples that comes from each store, 0..1, by name."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}

    @takes_options_of(LoaderOptions)
    def loader(self, options: LoaderOptions) -> "MixtureLoader":
        """A resumable loader of torch batches, see `MixtureLoader`; its keyword arguments are those of `Store.loader`.

            mixture = Mixture({"a": Store.open("A/store"), "b": Store.open("B/store")}, {"a": 0.7, "b": 0.3})
            loader = mixture.loader(batch_size=32, images=[64], text="t5", seed=0, rank=0, world_size=1)

        Raises:
            ValueError: see `check`; a number is out of range, or `samples` is given.
            TypeError: an option that does not exist.
        """
        from imagen_core.store.read.mixture_loader import MixtureLoader  # torch: reading samples needs none

        if options.samples is not None:
            raise ValueError("samples is for one store; give the ranges of each store to Mixture(samples=...)")
        self.check(options)
        return MixtureLoader(self.stores, self.weights, options, self.samples, self.caption_sets)

    def check(self, options: LoaderOptions) -> None:
        """Refuses stores whose samples cannot be in one batch.

        Raises:
            ValueError: a store lacks a size, an encoder or an array that is read, or has it by another encoder, of
                another dtype or shape, or images of other aspect-ratio buckets; names the store, and each field with
                both values.
        """
        read = {name: _what_is_read(name, store, options) for name, store in self.stores.items()}
        (first, wanted), *others = read.items()
        for name, found in others:
            self._check_shapes(first, name, options)
            for group, record in found.items():
                one, other = comparable_records(wanted[group], record)
                changes = [*changed_fields(one, other), *record_probe_differences(wanted[group], record)]
                if changes:
                    raise ValueError(
                        f"store {name}: its {group} is not made as that of store {first}: {'; '.join(changes[:5])}; "
                        "mix stores that are made alike, or make it again in one of them"
                    )
            self._warn_of_filters(first, name, options)

    def _check_shapes(self, first: str, name: str, options: LoaderOptions) -> None:
        for size in _stored_sizes(options):
            one, other = (self.stores[store].image_group(size).shapes for store in (first, name))
            if ratios_of(one) != ratios_of(other):
                raise ValueError(
                    f"store {name}: its images-{size} have other aspect-ratio buckets than those of store {first}: "
                    f"{shapes_difference(one, other)}; mix stores that are made alike, or make the images again in "
                    "one of them"
                )

    def _warn_of_filters(self, first: str, name: str, options: LoaderOptions) -> None:
        for size in _stored_sizes(options):
            one, other = (self.stores[store].image_group(size).config.get("filter") for store in (first, name))
            if one != other:
                log.warning("images-%d: resized by %s in store %s, by %s in store %s", size, one, first, other, name)


def _stored_sizes(options: LoaderOptions) -> list[int]:
    layout = (options.crop or FullImage()).layout(options.images or (), lambda size_px: (size_px, size_px))
    return [frame.stored_px for frame in layout.values()]


def _what_is_read(name: str, store: Store, options: LoaderOptions) -> dict[str, dict[str, Any]]:
    """What made each group of embeddings or arrays that is read, by the group's name.

    Raises:
        ValueError: the store lacks one, or a size.
    """
    try:
        for size in _stored_sizes(options):
            store.image_group(size)
        texts = [*options.texts.items(), (options.text_embed, None)]
        groups = [(store.text_group(encoder), layers) for encoder, layers in texts if encoder is not None]
        embeds = [store.image_embed_group(options.image_embed)] if options.image_embed is not None else []
        arrays = [store.array_group(array) for array in options.arrays or ()]
    except ValueError as error:
        raise ValueError(f"store {name}: {error}") from error
    made = {group.name: store.encoder_record(group, layers) for group, layers in groups}
    made |= {group.name: store.encoder_record(group) for group in embeds}
    for group in arrays:
        made[group.name] = {
            "dtype": group.spec.dtype,
            "shape": list(group.spec.shape),
            "fingerprint": dict(group.fingerprint),
        }
    return made
