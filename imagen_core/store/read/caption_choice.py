"""Which caption of a sample a loader takes: first a set by weight, then one of its captions."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.read.reader import OpenShard, StoreReader


class TakenCaption(NamedTuple):
    """A caption of a sample."""

    caption_set: str | None
    """None: that of `samples`."""
    number: int
    """Its index among the sample's captions of the set."""
    id: int
    """Its row in the set's text groups."""


class CaptionChoice:
    """The sets of captions of a store from which a loader takes, with their weights.

    A set of which a sample has no caption that was encoded is left out, and the weights of the others are taken; if
    none is left, a caption of `samples` is taken, which every sample has.

    Attributes:
        has_sets: whether a set other than that of `samples` has a weight.
    """

    def __init__(self, store: StoreReader, options: LoaderOptions) -> None:
        """
        Raises:
            ValueError: a set that the store lacks, or that was not encoded by an encoder that is read, or by another
                version of it; or a weight that is negative or not finite, or all are 0.
        """
        weights = wanted_weights(store.caption_sets, options.caption_sets)
        first = next(iter(store.caption_sets))
        self._weights = {None if name == first else name: weight for name, weight in weights.items() if weight}
        self._encoders = options.text_encoders
        self.has_sets = self._weights.keys() != {None}
        for name in filter(None, self._weights):
            for encoder in self._encoders:
                store.set_text_group(encoder, name)

    def take(self, files: OpenShard, row: int, choice: int, set_choice: int) -> TakenCaption:
        """The caption of a sample for two hashes of 64 bits."""
        if not self.has_sets:
            ids = files.samples.caption_ids(row)
            number = choice % len(ids)
            return TakenCaption(None, number, ids[number])
        found = {name: ids for name in self._weights if (ids := self._usable(files, row, name))}
        name = self._chosen(list(found), set_choice) if found else None
        usable = found[name] if found else self._usable(files, row, None)
        return TakenCaption(name, *usable[choice % len(usable)])

    def _usable(self, files: OpenShard, row: int, name: str | None) -> list[tuple[int, int]]:
        """Index and id of the sample's captions of a set that were encoded."""
        if name is None:
            return list(enumerate(files.samples.caption_ids(row)))
        ids = list(enumerate(files.caption_sets[name].caption_ids(row)))
        for encoder in self._encoders if ids else ():
            num_tokens = files.set_texts[encoder, name].num_tokens
            ids = [(number, i) for number, i in ids if num_tokens[i]]
        return ids

    def _chosen(self, names: list[str | None], set_choice: int) -> str | None:
        left = set_choice / 2**64 * sum(self._weights[name] for name in names)
        for name in names:
            left -= self._weights[name]
            if left < 0:
                return name
        return names[-1]


def wanted_weights(stored: Mapping[str, float], wanted: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of each set of captions that is named, in the store's order.

    Args:
        stored: the store's sets, with its own weights, which are taken for None.
        wanted: weights by set.
    Raises:
        ValueError: a set that the store lacks, a weight that is negative or not finite, or all are 0.
    """
    if wanted is None:
        return dict(stored)
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"caption set {missing[0]!r} is not in the store; it has {', '.join(stored)}")
    bad = next((name for name, weight in wanted.items() if not 0 <= weight < math.inf), None)
    if bad is not None or not any(wanted.values()):
        what = "all are 0" if bad is None else f"{bad} has {wanted[bad]}"
        raise ValueError(f"weights of caption sets must be finite and 0 or more, one of them above 0 ({what})")
    return {name: wanted[name] for name in stored if name in wanted}


def caption_shares(store: StoreReader, wanted: Mapping[str, float] | None) -> dict[str, float]:
    """The part of the captions that comes from each set with a weight, 0..1, of samples that have captions of all.

    Raises:
        ValueError: like `wanted_weights`.
    """
    weights = {name: weight for name, weight in wanted_weights(store.caption_sets, wanted).items() if weight}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
