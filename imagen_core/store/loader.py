"""Batches of a store for one rank of a training run, resumable in the middle of an epoch."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from imagen_core.store.crop import WHOLE, Crop
from imagen_core.store.order import derive_key, permute, pick
from imagen_core.store.ragged import Stored, restore

if TYPE_CHECKING:
    from imagen_core.store.reader import Store

_ORDER, _CAPTION = 0, 1  # what a key is for


class Loader:
    """Iterate over one epoch of batches with `for batch in loader`; the next `for` is the next epoch.

    Order. An epoch is a permutation of all samples made from (seed, epoch). A global batch is the next
    `world_size * batch_size` of them, split over the ranks in order. The last one may be smaller: it is
    split as evenly as can be, so each sample is seen exactly once an epoch, and every rank yields the
    same number of batches. A rank can then get an empty batch (B = 0); `drop_last` leaves that global
    batch out instead.

    Captions. Of several captions a sample, one is taken by a hash of (seed, epoch, sample): the same
    for any rank, world size and batch size.

    Resume. A batch that was received counts as consumed. `state_dict` of any rank (all ranks having
    received as many batches) restores all of them, with any world size and batch size. A `for` that is
    left early goes on from there.

    Each batch is a dict:
        keys: list[str], B of them.
        images: {S: uint8 (B, 3, S, S), 0..255}, in channels-last memory; only if images were asked for. With a
            crop, the side of each is that of the square.
        text: (B, L, dim) in the store's dtype (float16 for int8), zero padded, L = the longest of this
            batch after the cut at max_tokens (which also cuts the end-of-sentence token of those cut);
            only if text was asked for.
        text_mask: bool (B, L), true on real tokens; comes with text.
    """

    def __init__(
        self,
        store: "Store",
        *,
        batch_size: int,
        images: Sequence[int] | None,
        text: str | None,
        max_tokens: int | None,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        drop_last: bool,
        samples: range,
        crop: Crop | None,
    ) -> None:
        """Made by `Store.loader`, which explains the arguments."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more (got {batch_size})")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, or None (got {max_tokens})")
        if samples.step != 1 or not 0 <= samples.start <= samples.stop <= len(store):
            raise ValueError(f"samples must be a range of step 1 within {len(store)} samples (got {samples})")
        self._store = store
        self._samples = samples
        self._sides = {store.image_group(size).size_px: size for size in images or ()}
        self._crop = crop if self._sides else None
        if self._crop is not None:
            self._sides = self._crop.sides(list(self._sides))
        self._text_group = None if text is None else store.text_group(text)
        self._max_tokens = max_tokens
        self._seed, self._shuffle, self._drop_last = seed, shuffle, drop_last
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._epoch = self._position = 0

    def __len__(self) -> int:
        """Batches in a whole epoch; the same for all ranks."""
        num_global = len(self._samples) / (self._batch_size * self._world_size)
        return math.floor(num_global) if self._drop_last else math.ceil(num_global)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self._epoch
        while self._epoch == epoch and (size := self._next_global_size()):
            first = self._position + self._rank * size // self._world_size
            stop = self._position + (self._rank + 1) * size // self._world_size
            batch = self._read(self._epoch, np.arange(first, stop))
            self._position += size
            if not self._next_global_size():
                self._epoch, self._position = self._epoch + 1, 0
            yield batch

    def _next_global_size(self) -> int:
        """Samples in the next global batch; 0 at the end of the epoch."""
        left = len(self._samples) - self._position
        whole = self._batch_size * self._world_size
        return min(left, whole) if left >= whole or not self._drop_last else 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as JSON values: `position` samples of `epoch` are consumed by all ranks."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_samples": len(self._samples),
            "first_sample": self._samples.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the order is the same whatever the world size and batch size are now.

        Raises:
            ValueError: the state is of another seed, shuffle or store length, so of another order.
        """
        mine = self.state_dict()
        for name in ("seed", "shuffle", "num_samples", "first_sample"):
            if state.get(name, 0) != mine[name]:
                raise ValueError(
                    f"loader state has {name} {state.get(name, 0)}, this loader has {mine[name]}: the order of "
                    "samples differs; resume with the same store, seed and shuffle"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        if self._position and not self._next_global_size():
            self._epoch, self._position = self._epoch + 1, 0

    def _read(self, epoch: int, positions: np.ndarray) -> dict[str, Any]:
        indices = positions
        if self._shuffle:
            indices = permute(positions, len(self._samples), derive_key(self._seed, epoch, _ORDER))
        indices = indices + self._samples.start
        places = [(k, *self._store.locate(index)) for k, index in enumerate(indices.tolist())]
        places.sort(key=lambda place: place[1])  # shard by shard, so that a file is opened once a batch
        batch: dict[str, Any] = {"keys": [""] * len(places)}
        for k, shard, row in places:
            batch["keys"][k] = self._store.samples_file(shard).key(row)
        if self._sides:
            batch["images"] = self._read_images(epoch, positions, places)
        if self._text_group is not None:
            batch["text"], batch["text_mask"] = self._read_text(epoch, indices, places)
        return batch

    def _read_images(
        self, epoch: int, positions: np.ndarray, places: list[tuple[int, int, int]]
    ) -> dict[int, torch.Tensor]:
        windows = {size: [WHOLE] * len(places) for size in self._sides}
        if self._crop is not None:
            first = epoch * len(self._samples) + (int(positions[0]) if len(positions) else 0)
            windows = self._crop.windows(list(self._sides), range(first, first + len(positions)))
        images = {}
        for size, side in self._sides.items():
            pixels = np.empty((len(places), side, side, 3), dtype=np.uint8)
            for k, shard, row in places:
                pixels[k] = self._store.image_file(size, shard).pixels(row)[windows[size][k]]
            images[size] = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (b, 3, side, side)
        return images

    def _read_text(
        self, epoch: int, indices: np.ndarray, places: list[tuple[int, int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._text_group is not None
        group = self._text_group
        captions = self._caption_ids(epoch, indices, places)
        values = [np.empty((0, group.dim))] * len(places)
        for k, shard, _ in places:
            stored = self._store.text_file(group.encoder, shard).stored(captions[k])
            cut = slice(self._max_tokens)
            if stored.scales is not None:
                values[k] = restore(Stored(stored.values[cut], stored.scales[cut]), group.dtype)
            else:
                values[k] = stored.values[cut]
        kind = {"bfloat16": np.int16, "float32": np.float32}.get(group.dtype, np.float16)
        lengths = np.array([len(value) for value in values], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        padded = np.empty((len(places), longest, group.dim), dtype=kind)  # (b, l, dim)
        for k, value in enumerate(values):
            padded[k, : len(value)] = value.view(np.int16) if group.dtype == "bfloat16" else value
            padded[k, len(value) :] = 0
        mask = torch.from_numpy(np.arange(longest) < lengths[:, None])
        text = torch.from_numpy(padded)
        return (text.view(torch.bfloat16) if group.dtype == "bfloat16" else text), mask

    def _caption_ids(self, epoch: int, indices: np.ndarray, places: list[tuple[int, int, int]]) -> list[int]:
        firsts = np.zeros(len(places), dtype=np.int64)
        counts = np.ones(len(places), dtype=np.int64)
        for k, shard, row in places:
            offsets = self._store.samples_file(shard).offsets
            firsts[k], counts[k] = offsets[row], offsets[row + 1] - offsets[row]
        chosen = firsts + pick(indices, counts, derive_key(self._seed, epoch, _CAPTION))
        ids = [0] * len(places)
        for k, shard, _ in places:
            ids[k] = int(self._store.samples_file(shard).caption_ids[chosen[k]])
        return ids
