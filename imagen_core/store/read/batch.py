"""Reads samples of one or several stores into one batch of tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from imagen_core.store.array_spec import ArraySpec
from imagen_core.store.buckets import Shape, ratios_of, shapes_difference
from imagen_core.store.files.ragged import StoredEmbedding, restore
from imagen_core.store.read.caption_choice import CaptionChoice, TakenCaption
from imagen_core.store.read.crop import Frame, FullImage, Layout
from imagen_core.store.read.features import FeatureReader
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.read.reader import OpenShard, StoreReader
from imagen_core.store.records import EmbeddingGroup

_PADDED_DTYPES = {"bfloat16": np.dtype(np.int16), "float32": np.dtype(np.float32)}  # of others: float16


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of a batch.

    Attributes:
        shard, row: where it is in its store.
        choice: a hash; `choice % n` is the caption that is taken of n.
        set_choice: a hash of 64 bits by which the set of captions is chosen; unused where there is one.
        counter: decides the random numbers of its view.
        store: index of its store.
    """

    shard: int
    row: int
    choice: int
    counter: int
    store: int = 0
    set_choice: int = 0


class BatchReader:
    """Reads what the options of a loader ask for, see `Loader` for the parts of a batch.

    Attributes:
        has_caption_sets: whether a set of captions is to be chosen for each sample.
        ratios: height and width, in lowest terms, of the aspect-ratio buckets that a batch has one of; none where
            images are squares, or none are read.
    """

    def __init__(
        self,
        stores: Sequence[StoreReader],
        options: LoaderOptions,
        caption_sets: Sequence[Mapping[str, float] | None] | None = None,
    ) -> None:
        """`stores` have groups of the same dtypes and sizes; `caption_sets`: of each of them, instead of `options`'.

        Raises:
            ValueError: a size or encoder that a store lacks, or images of different aspect-ratio buckets.
        """
        self._stores, self._options = stores, options
        self._view = options.crop or FullImage()
        sets = [options.caption_sets] * len(stores) if caption_sets is None else caption_sets
        each = [replace(options, caption_sets=weights) for weights in sets]
        self._choices = list(map(CaptionChoice, stores, each)) if options.reads_captions else []
        self.has_caption_sets = any(choice.has_sets for choice in self._choices)
        self.ratios: tuple[Shape, ...] = ()
        self._layouts = self._layouts_by_bucket(options.images) if options.images else [{}]
        self._largest = {size: max(math.prod(each[size].shown) for each in self._layouts) for size in self._layouts[0]}
        """Most pixels of an image in a batch, by size."""
        self._features = [] if options.features is None else [FeatureReader(each, options.features) for each in stores]
        for store in reversed(stores):  # what describes the batch is taken of the first
            self._text_groups = [_with_layers(store.text_group(name), only) for name, only in options.texts.items()]
            self._text_embed_group = None if options.text_embed is None else store.text_group(options.text_embed)
            self._embed_group = None if options.image_embed is None else store.image_embed_group(options.image_embed)
            self._columns = {name: store.column_type(name) for name in options.columns or ()}
            self._array_groups = [store.array_group(name) for name in options.arrays or ()]

    def _layouts_by_bucket(self, sizes: Sequence[int]) -> list[Layout]:
        """How the images of each bucket are shown; of squares, where there are no buckets."""
        squares = self._view.layout(sizes, lambda size_px: (size_px, size_px))
        stored = sorted({frame.stored_px for frame in squares.values()})
        found = {(store, size): store.image_group(size) for store in self._stores for size in stored}
        first, *others = found.values()
        for group in others:
            if ratios_of(group.shapes) != ratios_of(first.shapes):
                raise ValueError(
                    f"{first.name} and {group.name} have different aspect-ratio buckets, so they cannot be in one "
                    f"batch: {shapes_difference(first.shapes, group.shapes)}; make both with the same settings"
                )
        shapes = {size: self._stores[0].image_group(size).shapes for size in stored}
        self.ratios = ratios_of(shapes[stored[0]])
        if not self.ratios:
            return [squares]
        return [
            self._view.layout(sizes, lambda size_px, bucket=bucket: shapes[size_px][bucket])
            for bucket in range(len(self.ratios))
        ]

    def read(self, draws: Sequence[Draw], bucket: int = 0) -> dict[str, Any]:
        """A batch of these samples, in this order; all are of one aspect-ratio bucket, if there are any."""
        layout = self._layouts[bucket]
        keys, captions, transcriptions = ([""] * len(draws) for _ in range(3))
        labels = self._empty((len(draws),), np.dtype(np.int64))
        images = {size: self._empty_images(len(draws), size, frame) for size, frame in layout.items()}
        pixels = {size: tensor.numpy() for size, tensor in images.items()}
        numbers = self._view.random_numbers([draw.counter for draw in draws]).tolist() if images else []
        rows: list[_Embeddings] = [_Embeddings([], {})] * len(draws)
        arrays = {group.array: [np.empty(0)] * len(draws) for group in self._array_groups}
        features = [np.empty(0)] * len(draws)
        columns: dict[str, list[Any]] = {name: [None] * len(draws) for name in self._columns}
        # Shard by shard, so that a file is opened once per batch.
        for store, shard, row, k in sorted((draw.store, draw.shard, draw.row, k) for k, draw in enumerate(draws)):
            files, draw, taken = self._stores[store].shard(shard), draws[k], None
            keys[k] = files.samples.key(row)
            if self._choices:
                taken = self._choices[store].take(files, row, draw.choice, draw.set_choice)
                captions[k] = _caption(files, row, taken) if self._options.captions else ""
            if self._options.transcriptions:
                transcriptions[k] = files.samples.transcription(row) or ""
            if self._options.labels:
                label = files.samples.label(row)
                labels[k] = -1 if label is None else label
            boxes = self._view.boxes(layout, numbers[k], files.samples.image(row)) if images else {}
            for size, box in boxes.items():
                frame = layout[size]
                pixels[size][k] = box.show(files.images[frame.stored_px].pixels(row), frame.shown)
            if self._features:
                flipped = any(box.flipped for box in boxes.values())
                features[k] = self._features[store].read(files, row, mirrored=flipped)
            rows[k] = self._embeddings(files, row, taken)
            for name, values in columns.items():
                values[k] = files.samples.kept(row, name)
            for name, values in arrays.items():
                values[k] = files.arrays[name].stored(row)
        batch: dict[str, Any] = {"keys": keys, **self._array_parts(arrays)}
        if images:
            batch["images"] = {size: tensor.permute(0, 3, 1, 2) for size, tensor in images.items()}  # (b, 3, h, w)
        batch |= self._embedding_parts(rows)
        if self._features:
            batch["features"] = self._stacked(features)
        if self._options.captions:
            batch["captions"] = captions
        if self._options.transcriptions:
            batch["transcriptions"] = transcriptions
        if self._options.labels:
            batch["labels"] = labels
        if columns:
            batch["columns"] = {name: self._column(values, name) for name, values in columns.items()}
        return batch

    def _embeddings(self, files: OpenShard, row: int, taken: TakenCaption | None) -> "_Embeddings":
        """The embeddings of a sample that are asked for."""
        found: dict[str, np.ndarray] = {}
        tokens = list[np.ndarray]()
        if taken is not None:
            stored = [_stored(files, group.encoder, taken, group.layers) for group in self._text_groups]
            tokens = [self._truncated(each, group) for each, group in zip(stored, self._text_groups, strict=True)]
        if taken is not None and (group := self._text_embed_group) is not None:
            stored = _stored(files, group.encoder, taken)
            found["text_embed"] = self._truncated(_one_vector(stored, group.name), group)
        if (group := self._embed_group) is not None:
            found["image_embed"] = self._truncated(files.image_embeds[group.encoder].stored(row), group)
        return _Embeddings(tokens, found)

    def _embedding_parts(self, rows: "list[_Embeddings]") -> dict[str, Any]:
        parts: dict[str, Any] = {}
        padded = [self._pad([row.tokens[k] for row in rows], group) for k, group in enumerate(self._text_groups)]
        if isinstance(self._options.text, str):
            ((parts["text"], parts["text_mask"]),) = padded
        elif padded:
            names = [group.encoder for group in self._text_groups]
            for part, tensors in zip(("text", "text_mask"), zip(*padded, strict=True), strict=True):
                parts[part] = dict(zip(names, tensors, strict=True))
        for name, group in {"text_embed": self._text_embed_group, "image_embed": self._embed_group}.items():
            if group is not None:
                parts[name] = self._pad([row.vectors[name] for row in rows], group)[0].reshape(-1, group.dim)
        return parts

    def _column(self, values: list[Any], name: str) -> torch.Tensor | list[str | None]:
        """Values of a kept column: text as it is, others as float64 with NaN for NULL."""
        if self._columns[name] == "text":
            return values
        tensor = self._empty((len(values),), np.dtype(np.float64))
        tensor.numpy()[:] = [math.nan if value is None else value for value in values]
        return tensor

    def _truncated(self, stored: StoredEmbedding, group: EmbeddingGroup) -> np.ndarray:
        """The first max_tokens of an embedding, in the type of the batch."""
        first = stored.first(self._options.max_tokens)
        if first.scales is not None:
            return restore(first, group.dtype)
        return first.values.view(np.int16) if group.dtype == "bfloat16" else first.values

    def _pad(self, embeddings: list[np.ndarray], group: EmbeddingGroup) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = np.array([len(embedding) for embedding in embeddings], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        dtype = _PADDED_DTYPES.get(group.dtype, np.dtype(np.float16))
        text = self._empty((len(embeddings), longest, *group.token_shape), dtype)
        for row, embedding in zip(text.numpy(), embeddings, strict=True):  # (l, dim) or (l, layers, dim)
            row[: len(embedding)] = embedding
            row[len(embedding) :] = 0
        mask = self._empty((len(embeddings), longest), np.dtype(np.bool_))
        np.less(np.arange(longest), lengths[:, None], out=mask.numpy())
        return (text.view(torch.bfloat16) if group.dtype == "bfloat16" else text), mask

    def _stacked(self, features: list[np.ndarray]) -> torch.Tensor:
        """Features of images of one shape: float16 (b, rows, columns, dim)."""
        grid = features[0].shape[:2] if features else (0, 0)
        batch = self._empty((len(features), *grid, self._features[0].dim), np.dtype(np.float16))
        for row, each in zip(batch.numpy(), features, strict=True):
            if each.shape != row.shape:
                raise ValueError(
                    f"features {self._options.features!r} are {each.shape} of one image and {row.shape} of another of "
                    "the same shape; make them with the same settings"
                )
            row[...] = each
        return batch

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

    def _empty_images(self, count: int, size: int, frame: Frame) -> torch.Tensor:
        """uint8 (count, h, w, 3), in memory for the largest bucket: the next batch gets that of an earlier one, which
        is in the caches, and no pages that the system has to clear."""
        height, width = frame.shown
        memory = self._empty((count * self._largest[size] * 3,), np.dtype(np.uint8))
        return memory[: count * height * width * 3].view(count, height, width, 3)

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        """Memory for a part of a batch. Pinned memory belongs to torch, which reuses it when the tensor is gone."""
        array = np.empty(0 if self._options.pin_memory else shape, dtype)
        tensor = torch.from_numpy(array)
        return torch.empty(shape, dtype=tensor.dtype, pin_memory=True) if self._options.pin_memory else tensor


class _Embeddings(NamedTuple):
    """Of a sample: its tokens by each text encoder, and its vectors by the part of the batch."""

    tokens: list[np.ndarray]
    vectors: dict[str, np.ndarray]


def _with_layers(group: EmbeddingGroup, layers: Sequence[int] | None) -> EmbeddingGroup:
    """A group of which only these layers are read; None reads all.

    Raises:
        ValueError: it lacks one.
    """
    if layers is None:
        return group
    group.layer_places(layers)
    return replace(group, layers=tuple(layers))


def _caption(files: OpenShard, row: int, taken: TakenCaption) -> str:
    if taken.caption_set is None:
        return files.samples.caption(row, taken.number)
    return files.caption_sets[taken.caption_set].caption(row, taken.number)


def _stored(files: OpenShard, encoder: str, taken: TakenCaption, layers: Sequence[int] = ()) -> StoredEmbedding:
    file = files.text[encoder] if taken.caption_set is None else files.set_texts[encoder, taken.caption_set]
    return file.stored(taken.id, layers or None)


def _one_vector(stored: StoredEmbedding, group: str) -> StoredEmbedding:
    """Refuses token embeddings, and layers, where one vector per caption is read."""
    if stored.values.ndim != 2:
        raise ValueError(f"{group}: holds layers of each token; text_embed reads encoders of one vector per caption")
    if len(stored.values) != 1:
        raise ValueError(
            f"{group}: holds {len(stored.values)} tokens of a caption; text_embed reads encoders of one vector per "
            "caption, such as kind: clip with output: projected"
        )
    return stored
