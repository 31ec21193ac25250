"""Batches of a store for one rank of a training run, resumable in the middle of an epoch."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from imagen_core.store.read.batch import BatchReader, Draw
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.read.order import CAPTION, ShuffledOrder, WindowedOrder, choices, derive_key
from imagen_core.store.read.reader import StoreReader

_STATE_NUMBERS = ("epoch", "position", "num_samples", "first_sample", "shuffle_window_shards", "num_removals")


def check_loader_state(state: Any) -> Any:
    """Returns a value of `Loader.state_dict` that may have been damaged, or written by hand.

    Raises:
        ValueError: a field is missing, or of another type or range.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"loader state must be a mapping (got {state!r})")
    for name in ("epoch", "position"):
        if name not in state:
            raise ValueError(f"loader state lacks {name}")
    for name in _STATE_NUMBERS:
        value = state.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"loader state has {name} {value!r}, which must be an integer of 0 or more")
    if state["position"] > state.get("num_samples", state["position"]):
        raise ValueError(f"loader state has position {state['position']} of {state['num_samples']} samples")
    return state


class Loader:
    """Iterate over one epoch of batches with `for batch in loader`; the next `for` is the next epoch.

    Order. An epoch is a permutation of all samples made from (seed, epoch); with `shuffle_window_shards`, of
    samples within windows of that many shards, and of the shards. A global batch is the next
    `world_size * batch_size` of them, split over the ranks in order. The last one may be smaller: it is
    split as evenly as can be, so each sample is seen exactly once per epoch, and every rank yields the
    same number of batches. A rank can then get an empty batch (B = 0); `drop_last` leaves that global
    batch out instead.

    Captions. If a sample has several captions, one is taken by a hash of (seed, epoch, sample): the same
    for any rank, world size and batch size.

    Resume. A batch that was received counts as consumed. `state_dict` of any rank (all ranks having
    received as many batches) restores all of them, with any world size and batch size. The next `for`
    after one that was left early continues from there. If samples were removed since the state was taken, the others
    come in the same batches as before; these are smaller by the removed samples, and can be empty. The same holds for
    samples that are removed while the loader reads, which it notices within a minute; and where compaction replaces
    files, it goes on with the new ones in the same order.

    Attributes:
        global_size: samples of the last batch over all ranks.

    Each batch is a dict:
        keys: list[str], B of them.
        images: {S: uint8 (B, 3, S, S), 0..255}, in channels-last memory; only if images were requested. With a
            crop, the side of each is the crop's.
        text: (B, L, dim) in the store's dtype (float16 for int8), zero padded, L = the longest of this
            batch after truncation to max_tokens (which also removes the end-of-sentence token of truncated
            captions); only if text was requested.
        text_mask: bool (B, L), true on real tokens; comes with text.
        text_embed: (B, dim), the same captions as one vector each in the store's dtype; only if requested.
        image_embed: (B, dim), embeddings of the images in the store's dtype; only if requested.
        captions: list[str], the caption taken from each sample; only if requested.
        transcriptions: list[str], the text written in each image, "" where there is none or it is unknown;
            only if requested.
        labels: int64 (B,), the class of each image from 0, -1 where it is unknown; only if requested.
        arrays: {name: (B, *shape)} in the dtype of the group; an axis whose length differs has that of the longest of
            this batch, and zeros behind each array; only if requested.
        array_sizes: {name: int64 (B, axes)}, the shape of each array; of the requested ones with such axes.
    """

    def __init__(self, store: StoreReader, options: LoaderOptions) -> None:
        """Made by `Store.loader`.

        Raises:
            ValueError: a size or encoder the store lacks, or a number out of range.
        """
        samples = range(len(store)) if options.samples is None else options.samples
        if samples.step != 1 or not 0 <= samples.start <= samples.stop <= len(store):
            raise ValueError(f"samples must be a range of step 1 within {len(store)} samples (got {samples})")
        if options.pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory is for copies to a CUDA device, and there is none; leave it off")
        self._store, self._options = store, options
        self._window_shards = options.shuffle_window_shards or 0
        self._reader = BatchReader([store], options)
        self._epoch = self._position = 0
        self.global_size = 0
        self._arrange(store.manifest.num_removals, samples)

    def _arrange(self, num_removals: int, samples: range) -> None:
        """Orders `samples`, indices of the samples that the store had after its first removals."""
        self._num_removals, self._samples = num_removals, samples
        self._places, self._removed = self._store.places(num_removals)
        self._shuffled = ShuffledOrder(len(samples), self._options.seed)
        if self._window_shards:
            self._windowed = WindowedOrder(self._places.bounds(samples), self._window_shards, self._options.seed)

    @property
    def _global_batch_size(self) -> int:
        return self._options.batch_size * self._options.world_size

    def __getitem__(self, index: object) -> Any:
        """Refused: torch's DataLoader would ask for single items.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a store's loader yields whole batches itself and is no data set for torch.utils.data.DataLoader; write "
            "`for batch in store.loader(...)`, with rank and world_size for several processes"
        )

    def __len__(self) -> int:
        """Batches in a complete epoch; the same for all ranks."""
        num_global = len(self._samples) / self._global_batch_size
        return math.floor(num_global) if self._options.drop_last else math.ceil(num_global)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self._epoch
        while self._epoch == epoch and (size := self._next_global_size()):
            first = self._position + self._options.rank * size // self._options.world_size
            stop = self._position + (self._options.rank + 1) * size // self._options.world_size
            batch = self._read(self._epoch, range(first, stop))
            self._advance(size)
            yield batch

    def skip(self) -> dict[str, Any]:
        """An empty batch instead of the next one, which counts as consumed; no file is read.

        For a rank that cannot read its part of a batch, but takes part in what the ranks do together.
        """
        batch = self._read(self._epoch, range(self._position, self._position))
        self._advance(self._next_global_size())
        return batch

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, those that were removed since the loader's state was taken included."""
        return len(self._samples)

    @property
    def consumed(self) -> int:
        """Samples gone through since the beginning of the first epoch."""
        return self._epoch * len(self._samples) + self._position

    def seek(self, consumed: int) -> None:
        """Goes to where so many samples were gone through since the beginning of the first epoch."""
        self._epoch, self._position = divmod(consumed, len(self._samples))

    @property
    def lacks_samples(self) -> bool:
        """Whether samples of an epoch may not be read any more."""
        return bool(self._removed or self._store.removed_since)

    def _advance(self, size: int) -> None:
        """Goes on behind the next global batch, which has `size` samples before removals."""
        self.global_size = size
        if self.lacks_samples:
            self.global_size = len(self._kept(self._epoch, range(self._position, self._position + size))[0])
        self._position += size
        if not self._next_global_size():
            self._epoch, self._position = self._epoch + 1, 0

    def _next_global_size(self) -> int:
        """Samples in the next global batch; 0 at the end of the epoch."""
        left, full = len(self._samples) - self._position, self._global_batch_size
        return min(left, full) if left >= full or not self._options.drop_last else 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as JSON values: `position` samples of `epoch` are consumed by all ranks."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._options.seed,
            "shuffle": self._options.shuffle,
            "num_samples": len(self._samples),
            "first_sample": self._samples.start,
            "shuffle_window_shards": self._window_shards,
            "num_removals": self._num_removals,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state; the order is the same whatever the world size and batch size are now.

        A state from before a removal keeps its order, for all epochs; the removed samples are missing from it.

        Raises:
            ValueError: the state is of another seed, shuffle or store length, and so of another order; or damaged.
        """
        check_loader_state(state)
        self._arrange_as(state)
        mine = self.state_dict()
        for name in ("seed", "shuffle", "num_samples", "first_sample", "shuffle_window_shards"):
            if state.get(name, 0) != mine[name]:
                raise ValueError(
                    f"loader state has {name} {state.get(name, 0)}, this loader has {mine[name]}: the order of "
                    "samples differs; resume with the same store, seed and shuffle"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        if self._position and not self._next_global_size():
            self._epoch, self._position = self._epoch + 1, 0

    def _arrange_as(self, state: dict[str, Any]) -> None:
        """Takes the samples of a state from before a removal, if this loader can have had them."""
        num_removals, mine = state.get("num_removals", 0), self._samples
        if num_removals > self._num_removals:
            raise ValueError(
                f"loader state knows {num_removals} removals, this store has {self._num_removals}: it is an older "
                "copy, which has samples that were removed; resume with the store as it is now"
            )
        if num_removals == self._num_removals:
            return
        places, removed = self._store.places(num_removals)
        first = state.get("first_sample", 0)
        samples = range(first, first + state.get("num_samples", 0))
        shifts = (samples.start - mine.start, samples.stop - mine.stop)
        if samples.stop <= len(places) and all(0 <= shift <= len(removed) for shift in shifts):
            self._arrange(num_removals, samples)

    def _kept(self, epoch: int, positions: range) -> tuple[list[int], np.ndarray, list[tuple[int, int]]]:
        """The samples at some positions that are not removed: their positions, indices, and shards with rows."""
        indices = self._order(epoch, np.arange(positions.start, positions.stop))
        places = [self._places.locate(index) for index in indices.tolist()]
        gone = self._removed | self._store.removed_since if self._store.removed_since else self._removed
        kept = [k for k, place in enumerate(places) if place not in gone]
        return kept, indices[kept], [places[k] for k in kept]

    def draws(self, epoch: int, positions: range) -> list[tuple[int, Draw]]:
        """The samples at some positions of an epoch, each with its position; those that are removed are left out."""
        kept, indices, places = self._kept(epoch, positions)
        hashes = choices(indices, derive_key(self._options.seed, epoch, CAPTION))
        at = [positions.start + k for k in kept]
        first = epoch * len(self._samples)
        return [(p, Draw(*place, choice, first + p)) for p, place, choice in zip(at, places, hashes, strict=True)]

    def _read(self, epoch: int, positions: range) -> dict[str, Any]:
        """Reads a batch; again if the store was changed meanwhile, so that no erased sample is in it."""
        while True:
            generation = self._store.generation
            batch = self._reader.read([draw for _, draw in self.draws(epoch, positions)])
            if generation == self._store.generation:
                return batch

    def _order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if self._window_shards:
            return self._windowed.indices(epoch, positions)
        if self._options.shuffle:
            positions = self._shuffled.indices(epoch, positions)
        return positions + self._samples.start
