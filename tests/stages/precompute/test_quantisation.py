"""What int8 costs: measured right, mergeable, and known for distributions with outliers."""

import numpy as np
import pytest

from imagen_core.store import cast_embedding, restore, token_errors
from pipeline.engine.tally import GroupTally
from pipeline.storage.record import Record
from stages.precompute.quantisation import cast_for_store, int8_errors, quantisation_counters, quantisation_summary

DIM = 4096


def gauss(tokens: int = 100) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(tokens, DIM)).astype(np.float32)


def test_errors_are_those_of_the_definition() -> None:
    x = gauss(7)
    stored = restore(cast_embedding(x, "int8"), "int8")
    errors = int8_errors(cast_embedding(x, "int8"), x)
    a, b = stored.astype(np.float64), x.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(errors.cosine, (a * b).sum(axis=1) / lengths, atol=1e-6)
    relative = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(errors.relative, relative, rtol=1e-4)
    np.testing.assert_allclose(errors.absolute, np.abs(a - b).max(axis=1), rtol=1e-4)


def test_tokens_of_zeros_equal_each_other_only() -> None:
    zeros, ones = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert token_errors(zeros, zeros).cosine.tolist() == [1.0]
    assert token_errors(zeros, ones).cosine.tolist() == [0.0]
    assert token_errors(zeros, ones).relative.tolist() == [1.0]
    assert token_errors(np.zeros((0, 4)), np.zeros((0, 4))).cosine.shape == (0,)


def test_counters_of_shards_merge_to_those_of_the_whole() -> None:
    embeddings = [gauss() * scale for scale in (1, np.linspace(1, 60, DIM, dtype=np.float32))]
    errors = [int8_errors(cast_embedding(x, "int8"), x) for x in embeddings]
    tally = GroupTally()
    for part in ([errors[0]], [], [errors[1]]):
        tally.add(Record("text-t5", 0, "", "", 0, 0, counters=quantisation_counters(part)))
    facts = quantisation_summary(tally.counters)
    assert facts == pytest.approx(quantisation_summary(quantisation_counters(errors)))
    cosine = np.concatenate([e.cosine for e in errors])
    assert facts["mean_cosine"] == pytest.approx(cosine.mean())
    assert facts["min_cosine"] == pytest.approx(cosine.min())
    assert quantisation_summary({}) == {}


def with_outliers(sigmas: float, channels: int) -> np.ndarray:
    x = gauss(300)
    x[:, :channels] *= sigmas
    return x


@pytest.mark.parametrize(
    ("x", "least"),
    [
        (gauss(), 0.9999),
        (with_outliers(30, 1), 0.99),
        (with_outliers(60, 3), 0.99),
        (with_outliers(60, 32), 0.99),
        (np.random.default_rng(0).standard_t(3, size=(300, DIM)), 0.99),
        (np.random.default_rng(0).standard_t(1.5, size=(300, DIM)), 0.99),
    ],
    ids=["gauss", "one channel x30", "three x60", "32 x60", "student t, 3", "student t, 1.5"],
)
def test_heavy_tails_stay_above_the_default_gate(x: np.ndarray, least: float) -> None:
    x = x.astype(np.float32)
    assert int8_errors(cast_embedding(x, "int8"), x).cosine.min() > least


def test_one_channel_200_times_the_others_is_at_the_gate() -> None:
    """All but the outlier is lost there: the worst that one channel can do to a token of 4096."""
    x = gauss(300)
    x[:, 7] = 230
    errors = int8_errors(cast_embedding(x, "int8"), x)
    assert 0.989 < errors.cosine.min() < 0.99
    others = np.delete(np.arange(DIM), 7)
    rest = token_errors(restore(cast_embedding(x, "int8"), "int8")[:, others], x[:, others])
    assert rest.cosine.max() < 0.9


def test_embeddings_that_the_dtype_cannot_hold_are_named_and_replaced() -> None:
    huge, outlier = np.full((2, 4), 1e5, np.float32), np.array([[1, 1, 1, 1000]], np.float32)
    good, blank = np.ones((3, 4), np.float32), cast_embedding(np.zeros((0, 4), np.float32), "float16")
    embeddings = [huge, good]
    stored, bad, costs = cast_for_store(embeddings, "float16", 0.0, blank)
    assert (bad, costs, embeddings) == ({0: ("non_finite_embedding", "as float16")}, {}, [])
    assert stored[0] is blank
    np.testing.assert_array_equal(restore(stored[1], "float16"), good)
    stored, bad, costs = cast_for_store([outlier, huge, good], "int8", 0.9999999, blank)
    assert {row: reason for row, (reason, _) in bad.items()} == {0: "quantisation_error", 1: "non_finite_embedding"}
    assert [len(embedding.values) for embedding in stored] == [0, 0, 3]
    assert costs["int8_tokens"] == 3
