"""Batches of a store for one rank of a training run, resumable in the middle of an epoch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from imagen_core.store.buckets import shapes_difference
from imagen_core.store.read.batch import BatchReader, Draw
from imagen_core.store.read.bucketed import MAX_LEFT_OUT, BucketedOrder, Cut, check_bucket_state
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.read.order import CAPTION, ShuffledOrder, WindowedOrder, choices, derive_key, permute, resample
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
    if state.get("buckets") is not None:
        check_bucket_state(state["buckets"], state["position"])
    return state


class Loader:
    """Iterate over one epoch of batches with `for batch in loader`; the next `for` is the next epoch.

    Order. An epoch is a permutation of all samples made from (seed, epoch); with `shuffle_window_shards`, of
    samples within windows of that many shards, and of the shards. A global batch is the next
    `world_size * batch_size` of them, split over the ranks in order. The last one may be smaller: it is
    split as evenly as can be, so each sample is seen exactly once per epoch, and every rank yields the
    same number of batches. A rank can then get an empty batch (B = 0); `drop_last` leaves that global
    batch out instead. With `replacement` each place of the epoch has a sample by a hash of (seed, epoch, place)
    instead: epochs are as long, and all else holds, but a sample may come more than once, or not at all.

    Buckets. Where the images of the store are of aspect-ratio buckets, each global batch is of one bucket: each
    bucket's samples are shuffled and cut into batches, and the batches of all buckets are shuffled. What is left of
    each bucket is a smaller batch at the end of the epoch, so each sample is still seen exactly once. With
    `shuffle_window_shards` a bucket's samples are shuffled within the windows; without `shuffle` the buckets come one
    after another. The order depends on the global batch size too.

    Captions. If a sample has several captions, one is taken by a hash of (seed, epoch, sample): the same
    for any rank, world size and batch size. Where the store has several sets of captions with weights, another such
    hash chooses the set first, independently for each sample, among those sets of which the sample has a caption.

    Resume. A batch that was received counts as consumed. `state_dict` of any rank (all ranks having
    received as many batches) restores all of them, with any world size and batch size; with buckets and another
    global batch size, the samples of the epoch that are left are cut into batches again. The next `for`
    after one that was left early continues from there. If samples were removed since the state was taken, the others
    come in the same batches as before; these are smaller by the removed samples, and can be empty. The same holds for
    samples that are removed while the loader reads, which it notices within a minute; and where compaction replaces
    files, it goes on with the new ones in the same order.

    Attributes:
        global_size: samples of the last batch over all ranks.

    Each batch is a dict:
        keys: list[str], B of them.
        images: {S: uint8 (B, 3, h, w), 0..255}, in channels-last memory; only if images were requested. h = w = S, or
            the shape of the batch's bucket; with a crop, that of the crop.
        text: (B, L, dim), or (B, L, layers, dim) where layers are stored apart, in the store's dtype (float16 for
            int8), zero padded, L = the longest of this batch after truncation to max_tokens (which also removes the
            end-of-sentence token of truncated captions); only if text was requested. With a list of encoders
            {encoder: such a tensor}, each with an L of its own.
        text_mask: bool (B, L), true on real tokens; comes with text, likewise by encoder.
        text_embed: (B, dim), the same captions as one vector each in the store's dtype; only if requested.
        image_embed: (B, dim), embeddings of the images in the store's dtype; only if requested.
        features: float16 (B, rows, columns, dim), of the patches of each image, mirrored where it is flipped; only if
            requested.
        captions: list[str], the caption taken from each sample; only if requested.
        transcriptions: list[str], the text written in each image, "" where there is none or it is unknown;
            only if requested.
        labels: int64 (B,), the class of each image from 0, -1 where it is unknown; only if requested.
        arrays: {name: (B, *shape)} in the dtype of the group; an axis whose length differs has that of the longest of
            this batch, and zeros behind each array; only if requested.
        columns: {name: values} of the columns that were kept of the source: float64 (B,) of numbers and booleans (1 is
            true), NaN where they are NULL; list[str | None] of text; only if requested.
        array_sizes: {name: int64 (B, axes)}, the shape of each array; of the requested ones with such axes.
    """

    def __init__(self, store: StoreReader, options: LoaderOptions) -> None:
        """Made by `Store.loader`.

        Raises:
            ValueError: a size or encoder the store lacks, a number out of range, a condition that does not fit, or
                `drop_last` would leave out more than 2 % of the samples of buckets.
            ImportError: there is a condition, and sqlglot is not installed.
        """
        store = store if options.where is None else store.where(options.where)
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
        if options.drop_last and self._bucketed is not None:
            self._check_left_out(self._bucketed)

    def _check_left_out(self, order: BucketedOrder) -> None:
        left = int((order.totals % self._global_batch_size).sum())
        if left > MAX_LEFT_OUT * len(self._samples):
            raise ValueError(
                f"drop_last would leave out {left} of {len(self._samples)} samples in each epoch, as each of the "
                f"aspect-ratio buckets has some left after batches of {self._global_batch_size}; leave drop_last off, "
                "or take smaller batches"
            )

    def _arrange(self, num_removals: int, samples: range) -> None:
        """Orders `samples`, indices of the samples that the store had after its first removals."""
        self._num_removals, self._samples = num_removals, samples
        self._places, self._removed = self._store.places(num_removals)
        place = resample if self._options.replacement else permute
        self._shuffled = ShuffledOrder(len(samples), self._options.seed, place)
        self._bucketed: BucketedOrder | None = None
        self._cut = Cut(self._global_batch_size, ())
        if self._reader.ratios:
            buckets = self._places.of_samples(self._store.buckets(self._reader.ratios), samples)
            self._bucketed = BucketedOrder(
                buckets,
                len(self._reader.ratios),
                bounds=self._places.bounds(samples) - samples.start,
                window=self._window_shards,
                seed=self._options.seed,
                shuffle=self._options.shuffle,
                place=place,
            )
            self._cut = self._bucketed.uncut(self._global_batch_size)
        elif self._window_shards:
            bounds = self._places.bounds(samples)
            self._windowed = WindowedOrder(bounds, self._window_shards, self._options.seed, place)

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
        if self._bucketed is not None:
            return self._bucketed.num_batches(self._global_batch_size, full_only=self._options.drop_last)
        num_global = len(self._samples) / self._global_batch_size
        return math.floor(num_global) if self._options.drop_last else math.ceil(num_global)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self._epoch
        while self._epoch == epoch and self._next_global_size():
            yield self.next_batch()

    def next_batch(self, consumed: int | None = None) -> dict[str, Any]:
        """The next batch, also of the next epoch.

        Args:
            consumed: samples that were gone through before it, for the random numbers of its views; None means those
                of this loader.
        """
        size, rank, world_size = self._next_global_size(), self._options.rank, self._options.world_size
        positions = range(self._position + rank * size // world_size, self._position + (rank + 1) * size // world_size)
        batch = self._read(self._epoch, positions, 0 if consumed is None else consumed - self.consumed)
        self._advance(size)
        return batch

    def skip(self) -> dict[str, Any]:
        """An empty batch instead of the next one, which counts as consumed; no file is read.

        For a rank that cannot read its part of a batch, but takes part in what the ranks do together.
        """
        batch = self._read(self._epoch, range(self._position, self._position), 0)
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
        """Goes to where so many samples were gone through since the beginning of the first epoch.

        Raises:
            ValueError: with buckets, no batch ends there.
        """
        epoch, position = divmod(consumed, len(self._samples))
        if self._bucketed is not None:
            cut = self._bucketed.uncut(self._global_batch_size)
            self._bucketed.consumed(epoch, cut, position)
            self._cut = cut
        self._epoch, self._position = epoch, position

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
        self._end_epoch()

    def _end_epoch(self) -> None:
        """Goes on with the next epoch if no batch is left in this one."""
        if not self._next_global_size():
            self._epoch, self._position = self._epoch + 1, 0
            if self._bucketed is not None:
                self._cut = self._bucketed.uncut(self._global_batch_size)

    def _next_global_size(self) -> int:
        """Samples in the next global batch; 0 at the end of the epoch."""
        if self._bucketed is not None:
            _, size = self._bucketed.next_batch(self._epoch, self._cut, self._position)
            return size if size == self._global_batch_size or not self._options.drop_last else 0
        left, full = len(self._samples) - self._position, self._global_batch_size
        return min(left, full) if left >= full or not self._options.drop_last else 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as JSON values: `position` samples of `epoch` are consumed by all ranks."""
        cut = self._cut
        ratios = [list(ratio) for ratio in self._reader.ratios]
        buckets = {"ratios": ratios, "batch_size": cut.batch_size, "starts": list(cut.starts)}
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._options.seed,
            "shuffle": self._options.shuffle,
            "num_samples": len(self._samples),
            "first_sample": self._samples.start,
            "shuffle_window_shards": self._window_shards,
            "num_removals": self._num_removals,
            **({} if self._bucketed is None else {"buckets": buckets}),
            **({} if self._places.digest is None else {"chosen": self._places.digest}),
            **({"replacement": True} if self._options.replacement else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state; the order is the same whatever the world size is now, and without buckets also
        whatever the batch size is.

        A state from before a removal keeps its order, for all epochs; the removed samples are missing from it.

        Raises:
            ValueError: the state is of another seed, shuffle or store length, and so of another order; or damaged.
        """
        check_loader_state(state)
        self._arrange_as(state)
        mine = self.state_dict()
        if state.get("chosen") != mine.get("chosen"):
            raise ValueError(
                "loader state is of another condition (`where`), or of other values in the store: the samples that it "
                "chooses differ; resume with the same condition and store. Values of samples that were removed and "
                "erased since are unknown"
            )
        for name in ("seed", "shuffle", "num_samples", "first_sample", "shuffle_window_shards", "replacement"):
            if state.get(name, 0) != mine.get(name, 0):
                raise ValueError(
                    f"loader state has {name} {state.get(name, 0)}, this loader has {mine.get(name, 0)}: the order of "
                    "samples differs; resume with the same store, seed and order"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        cut = self._cut_as(state, epoch, position)
        self._epoch, self._position, self._cut = epoch, position, cut
        if self._position:
            self._end_epoch()

    def _cut_as(self, state: dict[str, Any], epoch: int, position: int) -> Cut:
        """How the rest of a state's epoch is cut into batches: as it was, if they are as large as before."""
        buckets, mine = state.get("buckets"), [list(ratio) for ratio in self._reader.ratios]
        theirs = [] if buckets is None else [list(ratio) for ratio in buckets["ratios"]]
        if theirs != mine:
            difference = shapes_difference([(h, w) for h, w in theirs], self._reader.ratios)
            raise ValueError(
                f"loader state is of other aspect-ratio buckets than this loader: {difference}: the order of samples "
                "differs; resume with the same store and images"
            )
        if buckets is None or self._bucketed is None:
            return self._cut
        saved = Cut(buckets["batch_size"], tuple(buckets["starts"]))
        consumed = self._bucketed.consumed(epoch, saved, position)
        return saved if saved.batch_size == self._global_batch_size else Cut(self._global_batch_size, consumed)

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
        at = [positions.start + k for k in kept]
        of = np.array(at, np.int64) if self._options.replacement else indices  # a sample may come again in an epoch
        hashes = choices(of, derive_key(self._options.seed, epoch, CAPTION))
        first = epoch * len(self._samples)
        draws = [(p, Draw(*place, choice, first + p)) for p, place, choice in zip(at, places, hashes, strict=True)]
        if not self._reader.has_caption_sets:
            return draws
        sets = choices(of, derive_key(self._options.seed, epoch, CAPTION, 1))
        return [(p, replace(draw, set_choice=choice)) for (p, draw), choice in zip(draws, sets, strict=True)]

    def _read(self, epoch: int, positions: range, shift: int) -> dict[str, Any]:
        """Reads of the next batch, again if the store was changed meanwhile, so that no erased sample is in it.

        Args:
            shift: is added to the samples' counters.
        """
        bucket = 0 if self._bucketed is None else self._bucketed.next_batch(epoch, self._cut, self._position)[0]
        while True:
            generation = self._store.generation
            draws = [replace(draw, counter=draw.counter + shift) for _, draw in self.draws(epoch, positions)]
            batch = self._reader.read(draws, bucket)
            if generation == self._store.generation:
                return batch

    def _order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if self._bucketed is not None:
            return self._bucketed.indices(epoch, self._cut, positions) + self._samples.start
        if self._window_shards:
            return self._windowed.indices(epoch, positions)
        if self._options.shuffle:
            positions = self._shuffled.indices(epoch, positions)
        return positions + self._samples.start
