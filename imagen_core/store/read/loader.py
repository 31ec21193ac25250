"""Batches of a store for one rank of a training run, resumable in the middle of an epoch."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from imagen_core.store.array_spec import ArraySpec
from imagen_core.store.files.ragged import StoredEmbedding, restore
from imagen_core.store.read.crop import FullImage
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.read.order import CAPTION, ORDER, WindowedOrder, choices, derive_key, permute
from imagen_core.store.read.reader import StoreReader
from imagen_core.store.records import EmbeddingGroup

_STATE_NUMBERS = ("epoch", "position", "num_samples", "first_sample", "shuffle_window_shards", "num_removals")
_PADDED_DTYPES = {"bfloat16": np.dtype(np.int16), "float32": np.dtype(np.float32)}  # of others: float16


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
        self._view = options.crop or FullImage()
        self._layout = self._view.layout(options.images) if options.images else {}
        for stored, _ in self._layout.values():
            store.image_group(stored)
        self._text_group = None if options.text is None else store.text_group(options.text)
        self._text_embed_group = None if options.text_embed is None else store.text_group(options.text_embed)
        self._embed_group = None if options.image_embed is None else store.image_embed_group(options.image_embed)
        self._array_groups = [store.array_group(name) for name in options.arrays or ()]
        self._epoch = self._position = 0
        self.global_size = 0
        self._arrange(store.manifest.num_removals, samples)

    def _arrange(self, num_removals: int, samples: range) -> None:
        """Orders `samples`, indices of the samples that the store had after its first removals."""
        self._num_removals, self._samples = num_removals, samples
        self._places, self._removed = self._store.places(num_removals)
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

    def _advance(self, size: int) -> None:
        """Goes on behind the next global batch, which has `size` samples before removals."""
        self.global_size = size
        if self._removed or self._store.removed_since:
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

    def _read(self, epoch: int, positions: range) -> dict[str, Any]:
        """Reads a batch; again if the store was changed meanwhile, so that no erased sample is in it."""
        while True:
            generation = self._store.generation
            batch = self._read_once(epoch, positions)
            if generation == self._store.generation:
                return batch

    def _read_once(self, epoch: int, positions: range) -> dict[str, Any]:
        kept, indices, located = self._kept(epoch, positions)
        keys, captions, transcriptions = ([""] * len(kept) for _ in range(3))
        labels = self._empty((len(kept),), np.dtype(np.int64))
        shapes = {size: (len(kept), side, side, 3) for size, (_, side) in self._layout.items()}
        images = {size: self._empty(shape, np.dtype(np.uint8)) for size, shape in shapes.items()}
        pixels = {size: tensor.numpy() for size, tensor in images.items()}
        first = epoch * len(self._samples) + positions.start
        numbers = self._view.random_numbers([first + k for k in kept]).tolist() if images else []
        embeddings: list[np.ndarray] = [np.empty(0)] * len(kept)
        text_embeds: list[np.ndarray] = [np.empty(0)] * len(kept)
        embeds: list[np.ndarray] = [np.empty(0)] * len(kept)
        arrays = {group.array: [np.empty(0)] * len(kept) for group in self._array_groups}
        hashes = choices(indices, derive_key(self._options.seed, epoch, CAPTION))
        # Shard by shard, so that a file is opened once per batch.
        for shard, row, k in sorted((*place, k) for k, place in enumerate(located)):
            files = self._store.shard(shard)
            keys[k] = files.samples.key(row)
            if self._options.captions:
                captions[k] = files.samples.caption(row, hashes[k] % len(files.samples.caption_ids(row)))
            if self._options.transcriptions:
                transcriptions[k] = files.samples.transcription(row) or ""
            if self._options.labels:
                label = files.samples.label(row)
                labels[k] = -1 if label is None else label
            boxes = self._view.boxes(self._layout, numbers[k], files.samples.image(row)) if images else {}
            for size, box in boxes.items():
                stored, side = self._layout[size]
                pixels[size][k] = box.show(files.images[stored].pixels(row), side)
            if self._text_group is not None:
                ids = files.samples.caption_ids(row)
                stored = files.text[self._text_group.encoder].stored(ids[hashes[k] % len(ids)])
                embeddings[k] = self._truncated(stored, self._text_group)
            if self._text_embed_group is not None:
                ids = files.samples.caption_ids(row)
                group = self._text_embed_group
                stored = files.text[group.encoder].stored(ids[hashes[k] % len(ids)])
                text_embeds[k] = self._truncated(_one_vector(stored, group.name), group)
            if self._embed_group is not None:
                embeds[k] = self._truncated(
                    files.image_embeds[self._embed_group.encoder].stored(row), self._embed_group
                )
            for name, rows in arrays.items():
                rows[k] = files.arrays[name].stored(row)
        batch: dict[str, Any] = {"keys": keys, **self._array_parts(arrays)}
        if images:
            batch["images"] = {size: tensor.permute(0, 3, 1, 2) for size, tensor in images.items()}  # (b, 3, s, s)
        if self._text_group is not None:
            batch["text"], batch["text_mask"] = self._pad(embeddings, self._text_group)
        if self._text_embed_group is not None:
            vectors, _ = self._pad(text_embeds, self._text_embed_group)
            batch["text_embed"] = vectors.reshape(-1, self._text_embed_group.dim)
        if self._embed_group is not None:
            batch["image_embed"] = self._pad(embeds, self._embed_group)[0].reshape(-1, self._embed_group.dim)
        if self._options.captions:
            batch["captions"] = captions
        if self._options.transcriptions:
            batch["transcriptions"] = transcriptions
        if self._options.labels:
            batch["labels"] = labels
        return batch

    def _order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if self._window_shards:
            return self._windowed.indices(epoch, positions)
        if self._options.shuffle:
            positions = permute(positions, len(self._samples), derive_key(self._options.seed, epoch, ORDER))
        return positions + self._samples.start

    def _truncated(self, stored: StoredEmbedding, group: EmbeddingGroup) -> np.ndarray:
        """The first max_tokens of an embedding, (n_tokens, dim), in the type of the batch."""
        values = stored.values[: self._options.max_tokens]
        if stored.scales is not None:
            return restore(StoredEmbedding(values, stored.scales[: self._options.max_tokens]), group.dtype)
        return values.view(np.int16) if group.dtype == "bfloat16" else values

    def _pad(self, embeddings: list[np.ndarray], group: EmbeddingGroup) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = np.array([len(embedding) for embedding in embeddings], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        dtype = _PADDED_DTYPES.get(group.dtype, np.dtype(np.float16))
        text = self._empty((len(embeddings), longest, group.dim), dtype)
        for row, embedding in zip(text.numpy(), embeddings, strict=True):  # (l, dim)
            row[: len(embedding)] = embedding
            row[len(embedding) :] = 0
        mask = self._empty((len(embeddings), longest), np.dtype(np.bool_))
        np.less(np.arange(longest), lengths[:, None], out=mask.numpy())
        return (text.view(torch.bfloat16) if group.dtype == "bfloat16" else text), mask

    def _array_parts(self, arrays: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """The parts `arrays` and `array_sizes` of a batch."""
        if not arrays:
            return {}
        specs = {group.array: group.spec for group in self._array_groups}
        shapes = {name: [array.shape for array in arrays[name]] for name, spec in specs.items() if not spec.is_fixed}
        sizes = {
            name: np.array(rows, np.int64).reshape(len(rows), len(specs[name].shape)) for name, rows in shapes.items()
        }
        return {
            "arrays": {name: self._pad_arrays(arrays[name], spec) for name, spec in specs.items()},
            "array_sizes": {name: torch.from_numpy(rows) for name, rows in sizes.items()},
        }

    def _pad_arrays(self, arrays: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        lengths = [max((array.shape[axis] for array in arrays), default=0) for axis in range(len(spec.shape))]
        shape = tuple(longest if n is None else n for n, longest in zip(spec.shape, lengths, strict=True))
        signed = {"bool": np.dtype(np.bool_), "bfloat16": np.dtype(np.int16)}.get(spec.dtype, spec.disk_dtype)
        batch = self._empty((len(arrays), *shape), signed)
        for row, array in zip(batch.numpy(), arrays, strict=True) if shape else ():
            row[...] = 0
            row[tuple(map(slice, array.shape))] = array.view(signed)
        if not shape:
            batch.numpy()[:] = [array.view(signed) for array in arrays]
        return batch.view(torch.bfloat16) if spec.dtype == "bfloat16" else batch

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        """Memory for a part of a batch. Pinned memory belongs to torch, which reuses it when the tensor is gone."""
        array = np.empty(0 if self._options.pin_memory else shape, dtype)
        tensor = torch.from_numpy(array)
        return torch.empty(shape, dtype=tensor.dtype, pin_memory=True) if self._options.pin_memory else tensor


def _one_vector(stored: StoredEmbedding, group: str) -> StoredEmbedding:
    """Refuses token embeddings where one vector per caption is read."""
    if len(stored.values) != 1:
        raise ValueError(
            f"{group}: holds {len(stored.values)} tokens of a caption; text_embed reads encoders of one vector per "
            "caption, such as kind: clip with output: projected"
        )
    return stored
