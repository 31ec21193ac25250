"""CLIP score: how well an image fits its caption (Hessel et al. 2021, arXiv 2104.08718)."""

from dataclasses import dataclass

import numpy as np

from imagen_core.evaluation.checks import check_pair, check_rows


@dataclass(frozen=True, slots=True)
class ClipScore:
    """Mean over the images, on a scale of 100."""

    mean: float
    standard_error: float
    """Of the mean: the deviation over the images, divided by the root of their number."""


def clip_score(images: np.ndarray, texts: np.ndarray) -> ClipScore:
    """Mean of max(100 cos, 0) over pairs of rows of image and text embeddings (n, d); see `similarities`."""
    scores = (100 * similarities(images, texts)).clip(min=0)
    return ClipScore(float(scores.mean()), float(scores.std() / np.sqrt(len(scores))))


def similarities(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Cosines of pairs of rows of image and text embeddings (n, d), which are normalised here: float64 (n,).

    Raises:
        ValueError: other shapes, rows that are not finite or zero.
    """
    check_rows("image embeddings", images)
    check_rows("text embeddings", texts)
    check_pair(images, texts)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} image and {len(texts)} text embeddings; give one text per image")
    return (_normalised("image", images) * _normalised("text", texts)).sum(axis=1)


def _normalised(name: str, rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(np.asarray(rows, np.float64), axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{name} embeddings: row {int(np.argmin(lengths))} is zero and has no direction")
    return rows / lengths
