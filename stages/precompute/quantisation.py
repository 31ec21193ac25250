"""Casts embeddings to the store's dtype: finds the ones out of its range, and measures what int8 costs."""

from collections.abc import Mapping, Sequence

import numpy as np

from imagen_core.store import (
    NotFiniteError,
    StoredEmbedding,
    StoreDtype,
    TokenErrors,
    cast_embedding,
    restore,
    token_errors,
)


def cast_for_store(
    embeddings: list[np.ndarray], dtype: StoreDtype, min_cosine: float, blank: StoredEmbedding, num_scales: int = 1
) -> tuple[list[StoredEmbedding], dict[int, tuple[str, str]], dict[str, float]]:
    """Casts embeddings to the store's dtype, and replaces the ones that it cannot hold.

    Args:
        embeddings: float (n_tokens, dim), or (n_tokens, layers, dim). The list is emptied on the way, so that memory
            holds each of them once.
        min_cosine: least allowed cosine between a token, or each of its layers, and itself as int8.
        blank: replaces the ones that do not fit.
        num_scales: of int8, see `cast_embedding`.
    Returns:
        The embeddings as stored; reason and detail by index of the replaced ones; what int8 costs the others.
    """
    stored: list[StoredEmbedding] = []
    bad: dict[int, tuple[str, str]] = {}
    errors: list[TokenErrors] = []
    embeddings.reverse()
    while embeddings:
        embedding = embeddings.pop()
        try:
            cast = cast_embedding(embedding, dtype, num_scales)
        except NotFiniteError:
            bad[len(stored)] = ("non_finite_embedding", f"as {dtype}")
            cast = blank
        else:
            if dtype == "int8":
                error = int8_errors(cast, embedding)
                least = float(error.cosine.min(initial=1.0))
                if least < min_cosine:
                    bad[len(stored)] = ("quantisation_error", f"cosine {least:.4f} as int8")
                    cast = blank
                else:
                    errors.append(error)
        stored.append(cast)
    return stored, bad, quantisation_counters(errors)


def int8_errors(stored: StoredEmbedding, embedding: np.ndarray) -> TokenErrors:
    """Errors of a float32 embedding as int8: one entry per token, or per token and layer."""
    return token_errors(restore(stored, "int8"), embedding)


def quantisation_counters(errors: Sequence[TokenErrors]) -> dict[str, float]:
    """Sums, extremes and number of tokens, so that shards can be merged; empty without tokens."""
    cosine, relative = (np.concatenate([getattr(e, of) for e in errors] or [[]]) for of in ("cosine", "relative"))
    if not cosine.size:
        return {}
    return {
        "int8_tokens": int(cosine.size),
        "int8_cosine_sum": float(cosine.sum(dtype=np.float64)),
        "int8_cosine_min": float(cosine.min()),
        "int8_relative_error_sum": float(relative.sum(dtype=np.float64)),
        "int8_relative_error_max": float(relative.max()),
    }


def quantisation_summary(counters: Mapping[str, float]) -> dict[str, float]:
    """Means and extremes over tokens, from the counters of one or more shards; empty without int8."""
    if "int8_tokens" not in counters:
        return {}
    return {
        "mean_cosine": counters["int8_cosine_sum"] / counters["int8_tokens"],
        "min_cosine": counters["int8_cosine_min"],
        "mean_relative_error": counters["int8_relative_error_sum"] / counters["int8_tokens"],
        "max_relative_error": counters["int8_relative_error_max"],
    }


def quantisation_line(summary: Mapping[str, float]) -> str:
    """The summary as text."""
    return (
        f"cosine to float32 {summary['mean_cosine']:.5f} mean, {summary['min_cosine']:.5f} least; "
        f"relative error {summary['mean_relative_error']:.2%} mean, {summary['max_relative_error']:.2%} greatest"
    )
