"""Decides which images are duplicates of which, by their order: the first one of equal or alike images is kept."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.plan import Show
from stages.duplicates.alike import alike
from stages.duplicates.hashing import PLAIN
from stages.duplicates.search import near

_ROWS_AT_ONCE = 1 << 16
_MOST_COMPARED = 32
"""How many earlier images an image is compared with at most: those of the nearest hashes, of these the first."""

Thumbnails = Callable[[np.ndarray], np.ndarray]
"""Thumbnails, uint8 (n, side, side, 3), of images by their rising numbers, int64 (n,)."""


@dataclass(frozen=True, slots=True)
class Matches:
    """Which image each image is a duplicate of.

    Attributes:
        kept: int64 (n,), the number of the image that is kept in its place; its own if it is none.
        bits: uint8 (n,), how many bits of their hashes differ; 0 for equal images.
        mirrored: bool (n,).
        equal: bool (n,), whether the pixels are the same, as those of a duplicate of it that is not kept.
    """

    kept: np.ndarray
    bits: np.ndarray
    mirrored: np.ndarray
    equal: np.ndarray


def match(
    pixels: np.ndarray,
    perceptual: np.ndarray,
    num_excluded: int,
    thumbnails: Thumbnails | None,
    show: Show = lambda _: None,
) -> Matches:
    """Compares all images.

    The result is a function of the images in their order, and that of the first n is the same whatever comes later.

    Args:
        pixels: SHA-256 of the decoded images, uint8 (n, 32).
        perceptual: uint64 (n, num_perceptual).
        num_excluded: so many images at the beginning must not be in training; they are not compared with each other.
        thumbnails: None finds only equal images.
        show: shows how far the search is.
    """
    count = len(pixels)
    kept, bits = np.arange(count), np.zeros(count, np.uint8)
    mirrored, equal = np.zeros(count, bool), np.zeros(count, bool)
    _, first, inverse = np.unique(pixels.view("V32").ravel(), return_index=True, return_inverse=True)
    first_of = first[inverse]
    equal = (first_of != kept) & (kept >= num_excluded)
    kept = np.where(equal, first_of, kept)
    if thumbnails is not None:
        _match_near(kept, bits, mirrored, np.sort(first), perceptual, num_excluded, thumbnails, show)
        kept = np.where(equal, kept[kept], kept)  # an image that equals one which is a near duplicate itself
    return Matches(kept, bits, mirrored, equal)


def _match_near(
    kept: np.ndarray,
    bits: np.ndarray,
    mirrored: np.ndarray,
    images: np.ndarray,
    perceptual: np.ndarray,
    num_excluded: int,
    thumbnails: Thumbnails,
    show: Show,
) -> None:
    """Fills in the near duplicates among images that all differ in their pixels, by their numbers."""
    pairs = _candidates(images, perceptual, num_excluded, show)
    if not len(pairs):
        return
    wanted = np.unique(np.concatenate([pairs["later"], pairs["earlier"]]))
    shown = thumbnails(wanted)
    compared, of = 0, -1
    rows = (row for low in range(0, len(pairs), _ROWS_AT_ONCE) for row in pairs[low : low + _ROWS_AT_ONCE].tolist())
    for number, (later, earlier, distance, flipped) in enumerate(rows):
        if later != of:
            compared, of = 0, later
        if kept[later] != later or kept[earlier] != earlier or compared == _MOST_COMPARED:
            continue  # it has been found, or the other one is a duplicate itself
        compared += 1
        show(f"thumbnails of {number:,}/{len(pairs):,} pairs compared")
        a, b = np.searchsorted(wanted, (later, earlier))
        if alike(shown[a], shown[b], mirrored=bool(flipped)):
            kept[later], bits[later], mirrored[later] = earlier, distance, flipped


_PAIR = np.dtype([("later", "<i8"), ("earlier", "<i8"), ("bits", "u1"), ("mirrored", "u1")])


def _candidates(images: np.ndarray, perceptual: np.ndarray, num_excluded: int, show: Show) -> np.ndarray:
    """Pairs of images with near hashes, ordered by the later one, the distance and the earlier one; each once."""
    plain = np.ascontiguousarray(perceptual[images, PLAIN])
    queries, members, starts = _by_hash(plain)
    found = []
    for variant in range(perceptual.shape[1]):
        hashes, others, other_starts = _by_hash(np.ascontiguousarray(perceptual[images, variant]))
        show(f"hash {variant + 1}/{perceptual.shape[1]} of {len(images):,} images searched")
        for query, hash, distance in near(queries, hashes):
            one, two, of = _expanded(query, hash, members, starts, others, other_starts)
            a, b = images[one], images[two]
            pairs = np.empty(len(a), _PAIR)
            pairs["later"], pairs["earlier"] = np.maximum(a, b), np.minimum(a, b)
            pairs["bits"], pairs["mirrored"] = distance[of], variant % 2
            found.append(pairs[(a != b) & (pairs["later"] >= num_excluded)])
    if not found:
        return np.empty(0, _PAIR)
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort((pairs["mirrored"], pairs["earlier"], pairs["bits"], pairs["later"]))]
    _, once = np.unique(pairs["later"] * len(perceptual) + pairs["earlier"], return_index=True)
    return pairs[np.sort(once)]


def _by_hash(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct hashes; the positions of all in their order, the earlier first; and where those of each start."""
    order = np.argsort(hashes, kind="stable")
    distinct, starts = np.unique(hashes[order], return_index=True)
    return distinct, order, np.append(starts, len(hashes))


def _expanded(
    query: np.ndarray,
    hash: np.ndarray,
    members: np.ndarray,
    starts: np.ndarray,
    others: np.ndarray,
    other_starts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of images from pairs of hashes: all images of one with the first _MOST_COMPARED of the other, both ways.

    Returns:
        Positions of both images, and of the pair of hashes that they come from.
    """
    sizes = starts[query + 1] - starts[query]
    other_sizes = other_starts[hash + 1] - other_starts[hash]
    parts = [
        _product(sizes, np.minimum(other_sizes, _MOST_COMPARED)),
        _product(np.minimum(sizes, _MOST_COMPARED), other_sizes),
    ]
    of, one, two = (np.concatenate(column) for column in zip(*parts, strict=True))
    return members[starts[query][of] + one], others[other_starts[hash][of] + two], of


def _product(sizes: np.ndarray, other_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each i all pairs of numbers below sizes[i] and other_sizes[i], after i."""
    counts = sizes * other_sizes
    of = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    return of, number // other_sizes[of], number % other_sizes[of]
