"""Inception score, CLIP score, precision and recall against values known beforehand."""

import math

import numpy as np
import pytest

from imagen_core.evaluation import clip_score, inception_score, precision_recall


def test_sure_and_varied_answers_score_the_number_of_classes_and_equal_ones_1() -> None:
    sure = np.tile(60.0 * np.eye(8), (10, 1))
    assert inception_score(sure, num_splits=5).mean == pytest.approx(8, rel=1e-12)
    assert inception_score(np.ones((80, 8)), num_splits=5).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(sure[:1].repeat(80, axis=0), num_splits=5).mean == pytest.approx(1, rel=1e-12)


def test_the_inception_score_is_the_formula_of_each_split() -> None:
    logits = np.random.default_rng(0).standard_normal((30, 4))
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in part]
        marginal = [sum(column) / 10 for column in zip(*p, strict=True)]
        divergences = [sum(v * math.log(v / m) for v, m in zip(row, marginal, strict=True)) for row in p]
        scores.append(math.exp(sum(divergences) / 10))
    found = inception_score(logits, num_splits=3)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.std == pytest.approx(np.std(scores), rel=1e-9)
    shifted = inception_score(logits + 500, num_splits=3)
    assert shifted.mean == pytest.approx(found.mean, rel=1e-9), "logits are known up to a constant"


def test_fewer_rows_than_splits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits: must be \(n, d\) with n at least 10 \(got \(9, 4\)\)"):
        inception_score(np.ones((9, 4)))


def test_the_clip_score_is_the_cosine_times_100_and_never_below_0() -> None:
    images = np.array([[3.0, 0.0], [0.0, 0.1], [1.0, 1.0], [2.0, 0.0]], np.float32)
    texts = np.array([[7.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
    expected = [100, 0, 100 / math.sqrt(2), 0]
    found = clip_score(images, texts)
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-6)
    assert found.standard_error == pytest.approx(np.std(expected) / 2, rel=1e-6)


def test_embeddings_that_make_no_pairs_are_refused() -> None:
    rows = np.ones((3, 2))
    with pytest.raises(ValueError, match="3 image and 2 text embeddings"):
        clip_score(rows, rows[:2])
    with pytest.raises(ValueError, match="text embeddings: row 1 is zero"):
        clip_score(rows, np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))


def brute_force(rows: np.ndarray, others: np.ndarray, k: int) -> float:
    radii = [sorted(math.dist(a, b) for b in others)[k] for a in others]
    balls = list(zip(others, radii, strict=True))
    return float(np.mean([any(math.dist(row, centre) <= radius for centre, radius in balls) for row in rows]))


def test_precision_and_recall_are_what_neighbours_one_by_one_give() -> None:
    random = np.random.default_rng(0)
    generated, real = random.standard_normal((40, 3)) * 0.5, random.standard_normal((60, 3))
    found = precision_recall(generated, real, num_neighbours=2)
    assert found.precision == brute_force(generated, real, 2)
    assert found.recall == brute_force(real, generated, 2)
    assert found.precision > found.recall, "half the width: inside the real ones, and covers few of them"


def test_a_set_of_features_lies_among_itself_and_not_among_one_far_away() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 3))
    same, far = precision_recall(rows, rows), precision_recall(rows, rows + 100)
    assert (same.precision, same.recall, far.precision, far.recall) == (1, 1, 0, 0)
