"""The samples whose stored vectors are nearest to those of one sample."""

import heapq
import time
from dataclasses import dataclass

import numpy as np

from imagen_core.store import EmbeddingGroup, ImageEmbedGroup, SetTextGroup, Store, StoreError
from stages.browse.store.sample import embedding_row, embedding_values

_MOST_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A sample; `cosine` is that of its vector to the one of the page, of captions averaged over their tokens."""

    cosine: float
    shard: int
    row: int
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest samples, and how many vectors were compared until the time was over.

    Attributes:
        problems: a line for each shard that could not be read.
    """

    found: list[Neighbour]
    compared: int
    is_all: bool
    problems: tuple[str, ...] = ()


def nearest(
    store: Store,
    group: EmbeddingGroup,
    position: int,
    row: int,
    number: int,
    *,
    most: int = 12,
    seconds: float = _MOST_SECONDS,
) -> Nearest:
    """The samples nearest to one, by the cosine of stored vectors; a caption that occurs twice in a shard counts once.

    Shards are read from the sample's on, then from the first on, until the time is over.

    Args:
        store: for this call alone.
        group: of image embeddings, or of captions, which are averaged over their tokens.
        number: of the caption among those of its set.
    Raises:
        StoreError: a file of the sample's own shard cannot be read.
        LookupError: the sample has no such caption.
    """
    own = embedding_row(store, group, position, row, number)
    wanted = _unit(_mean(store, group, position, own)[None])[0]
    shards = np.flatnonzero(store.manifest.rows).tolist()
    start, until = shards.index(position), time.monotonic() + seconds
    best: list[tuple[float, int, int]] = []
    compared = read = 0
    problems: list[str] = []
    for at in shards[start:] + shards[:start]:
        read += 1
        try:
            rows = {i: of for i, of in _rows(store, group, at).items() if (at, i) != (position, own)}
            means = [_mean(store, group, at, i) for i in rows]
        except StoreError as error:
            problems.append(str(error))
            continue
        if rows:
            cosines = _unit(np.stack(means)) @ wanted
            found = [(cosine, -at, -of) for cosine, of in zip(cosines.tolist(), rows.values(), strict=True)]
            best = heapq.nlargest(most, [*best, *found])
        compared += len(rows)
        if time.monotonic() > until:
            break
    neighbours = [_neighbour(store, c, -at, -of) for c, at, of in best]
    return Nearest(neighbours, compared, read == len(shards), tuple(problems))


def _rows(store: Store, group: EmbeddingGroup, position: int) -> dict[int, int]:
    """The rows of a group's file that samples use, and the first sample of each."""
    excluded = store.manifest.excluded.get(position, {})
    files, kept = store.shard(position), [r for r in range(int(store.manifest.rows[position])) if r not in excluded]
    if isinstance(group, ImageEmbedGroup):
        return {row: row for row in kept}
    captions = files.caption_sets[group.caption_set] if isinstance(group, SetTextGroup) else files.samples
    return {i: row for row in reversed(kept) for i in captions.caption_ids(row)}


def _mean(store: Store, group: EmbeddingGroup, position: int, number: int) -> np.ndarray:
    values = embedding_values(store, group, position, number)
    return values.mean(axis=0, dtype=np.float32) if len(values) else np.zeros(values.shape[1], np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


def _neighbour(store: Store, cosine: float, position: int, row: int) -> Neighbour:
    sample = store.shard(position).samples.row(row)
    return Neighbour(cosine, int(store.manifest.index[position]), row, sample.key, sample.captions[0])
