"""What the page of one sample shows."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from imagen_core.store import EmbeddingGroup, ImageEmbedGroup, SetTextGroup, Store, TextGroup, restore
from imagen_core.store.files.shard import EmbeddingFile
from pipeline.storage.run_folder import RunFolder
from stages.browse.charts import BarChart, Bin, bar_chart
from stages.browse.store.tokens import Tokens, tokens_of
from stages.browse.web import Part, part
from stages.store_tools.caption_origins import caption_origins, made_line, origin_line

_SHOWN_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Image:
    """One size of a sample's image; `digest` begins the sha256 of its file."""

    size_px: int
    width: int
    height: int
    codec: str
    digest: str


@dataclass(frozen=True, slots=True)
class Embedding:
    """Statistics of one embedding; norms are Euclidean, of each token.

    Attributes:
        index: of its group in `embedding_groups`.
        number: of the caption among the sample's captions of its set; 0 for an image.
    """

    group: str
    index: int
    number: int
    shape: tuple[int, ...]
    dtype: str
    norms: BarChart
    smallest: float
    greatest: float
    mean: float
    std: float
    least_norm: float
    greatest_norm: float
    not_finite: int


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption, how a model came to it ("" for others), and what each text encoder made of it."""

    text: str
    made: str
    tokens: Mapping[str, Part[Tokens]]
    embeddings: Mapping[str, Part[Embedding]]


@dataclass(frozen=True, slots=True)
class CaptionSet:
    """The captions of a set that a sample has, and who wrote them.

    Attributes:
        origin: "" if it is not known.
        prompt: what a model was asked about the sample; None for captions that came with data.
    """

    name: str
    captions: list[Caption]
    origin: Part[str]
    prompt: str | None


def images_of(store: Store, position: int, row: int) -> list[Part[Image]]:
    """Every size, each of which may be unreadable alone."""

    def one(size: int) -> Image:
        group = store.image_group(size)
        height, width = store.shard(position).images[size].shape(row)
        return Image(size, width, height, group.codec, file_digest_of(store, group.name, position))

    return [part(lambda size=size: one(size)) for size in store.image_sizes]


def file_digest_of(store: Store, group: str, position: int) -> str:
    """The first digits of the sha256 of a shard's file: a part of its images' addresses, which browsers keep."""
    entry = store.manifest.file(group, position)
    assert entry is not None, "a shard with samples has all files"
    return entry.sha256[:16]


def captions_of(store: Store, position: int, row: int, run: RunFolder | None) -> list[CaptionSet]:
    """The captions of all sets, that of `samples` first, with who wrote them."""
    manifest, found = store.manifest, list[CaptionSet]()
    origins = part(lambda: caption_origins(store, position, row, run))
    for name in store.caption_sets:
        further = name if name in manifest.captions else None
        groups = [g for g in embedding_groups(store) if _set_of(g) == further]
        origin = (origins.value or {}).get(name, {})
        made = [made_line(caption) for caption in origin.get("captions", ())]
        captions = [
            Caption(
                text,
                made[number] if number < len(made) else "",
                {g.encoder: part(lambda g=g, i=i, t=text: _tokens(store, g, position, i, t, run)) for g in groups},
                {g.encoder: part(lambda g=g, n=number: _statistics(store, g, position, row, n)) for g in groups},
            )
            for number, (text, i) in enumerate(_texts(store, position, row, further))
        ]
        line = part(lambda name=name: origin_line(origins.get()[name]))
        found.append(CaptionSet(name, captions, line, origin.get("prompt")))
    return found


def image_embeddings_of(store: Store, position: int, row: int) -> list[Part[Embedding]]:
    """Of every image encoder."""
    groups = store.manifest.image_embeds.values()
    return [part(lambda group=group: _statistics(store, group, position, row, 0)) for group in groups]


def embedding_groups(store: Store) -> list[EmbeddingGroup]:
    """All groups of embeddings; addresses name one by its index here."""
    manifest = store.manifest
    return [*manifest.texts.values(), *manifest.set_texts.values(), *manifest.image_embeds.values()]


def embedding_row(store: Store, group: EmbeddingGroup, position: int, row: int, number: int) -> int:
    """The row in a group's file of a sample's caption, by its number among those of its set; of an image the sample's.

    Raises:
        LookupError: the sample has no such caption.
        StoreError: its captions cannot be read.
    """
    if isinstance(group, ImageEmbedGroup):
        return row
    texts = list(_texts(store, position, row, _set_of(group)))
    if number >= len(texts):
        raise LookupError(f"the sample has {len(texts)} captions")
    return texts[number][1]


def embedding_values(store: Store, group: EmbeddingGroup, position: int, number: int) -> np.ndarray:
    """One embedding, float (n_tokens, dim); of one with layers these are beside each other.

    Args:
        number: its row in the group's file.
    Raises:
        StoreError: it cannot be read.
    """
    values = restore(embedding_file(store, group, position).stored(number), group.dtype)
    return values.reshape(len(values), math.prod(values.shape[1:]))


def embedding_file(store: Store, group: EmbeddingGroup, position: int) -> EmbeddingFile:
    """The open file of a group in a shard.

    Raises:
        StoreError: it is missing or unreadable.
    """
    files = store.shard(position)
    if isinstance(group, SetTextGroup):
        return files.set_texts[group.encoder, group.caption_set]
    return (files.text if isinstance(group, TextGroup) else files.image_embeds)[group.encoder]


def _set_of(group: EmbeddingGroup) -> str | None:
    """The further set of captions that a text group is of; None for the first set, "" for images."""
    if isinstance(group, SetTextGroup):
        return group.caption_set
    return None if isinstance(group, TextGroup) else ""


def _texts(store: Store, position: int, row: int, further: str | None) -> Iterator[tuple[str, int]]:
    """The captions of a set and the row of each in the set's text groups."""
    files = store.shard(position)
    if further is None:
        sample = files.samples.row(row)
        return zip(sample.captions, sample.caption_ids, strict=True)
    file = files.caption_sets[further]
    return zip(file.captions(row), file.caption_ids(row), strict=True)


def _tokens(store: Store, group: EmbeddingGroup, position: int, id_: int, text: str, run: RunFolder | None) -> Tokens:
    return tokens_of(text, int(embedding_file(store, group, position).num_tokens[id_]), group, run)


def _statistics(store: Store, group: EmbeddingGroup, position: int, row: int, number: int) -> Embedding:
    found = embedding_values(store, group, position, embedding_row(store, group, position, row, number))
    values = found.astype(np.float32)
    norms = np.sqrt(np.einsum("td,td->t", values, values))
    bins = [Bin(f"token {i}: norm", float(norm)) for i, norm in enumerate(norms[:_SHOWN_TOKENS].tolist())]
    finite = values[np.isfinite(values)]
    return Embedding(
        group=group.name,
        index=embedding_groups(store).index(group),
        number=number,
        shape=(len(values), *group.token_shape),
        dtype=group.dtype,
        norms=bar_chart(f"norm of each token, {group.name}", bins, ("first token", "last token")),
        smallest=float(finite.min(initial=0)),
        greatest=float(finite.max(initial=0)),
        mean=float(finite.mean()) if finite.size else 0.0,
        std=float(finite.std()) if finite.size else 0.0,
        least_norm=float(norms.min(initial=np.inf)) if len(norms) else 0.0,
        greatest_norm=float(norms.max(initial=0)),
        not_finite=int(values.size - finite.size),
    )
