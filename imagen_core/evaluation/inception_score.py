"""Inception score (Salimans et al. 2016, arXiv 1606.03498): how certain and how varied a classifier's answers are."""

from dataclasses import dataclass

import numpy as np

from imagen_core.evaluation.checks import check_rows


@dataclass(frozen=True, slots=True)
class InceptionScore:
    """Mean and standard deviation over splits; between 1 and the number of classes."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, *, num_splits: int = 10) -> InceptionScore:
    """exp(mean KL(p(y|x) | p(y))) of each of `num_splits` runs of consecutive rows, from logits (n, classes).

    Logarithms of probabilities are logits too.

    Raises:
        ValueError: fewer rows than splits, or rows that are not finite.
    """
    if num_splits < 1:
        raise ValueError(f"num_splits must be 1 or more (got {num_splits})")
    check_rows("logits", logits, min_rows=num_splits)
    scores = [float(np.exp(_mutual_information(part))) for part in np.array_split(logits, num_splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _mutual_information(logits: np.ndarray) -> float:
    """Of image and class, in nats."""
    shifted = np.asarray(logits, np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # (n, classes)
    marginal = np.exp(log_p).mean(axis=0)
    present = marginal > 0  # a class that underflowed in every row adds nothing
    return float((np.exp(log_p) * (log_p - np.log(np.where(present, marginal, 1)))).sum(axis=1).mean())
