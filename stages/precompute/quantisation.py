"""What the store can hold: embeddings out of range are found, and what int8 costs is measured when it is written."""

from collections.abc import Mapping, Sequence

import numpy as np

from imagen_core.store import StoreDtype, TokenErrors, cast_embedding, is_finite_as, restore, token_errors


def storable(
    embeddings: Sequence[np.ndarray], dim: int, dtype: StoreDtype, min_cosine: float
) -> tuple[list[np.ndarray], dict[int, tuple[str, str]], dict[str, float]]:
    """Replaces embeddings that the store's dtype cannot hold by zero tokens.

    Args:
        min_cosine: of a token as int8 to itself; less is not held.
    Returns:
        The embeddings; reason and detail of the replaced ones; what rounding costs the others.
    """
    bad: dict[int, tuple[str, str]] = {}
    errors: list[TokenErrors] = []
    for i, embedding in enumerate(embeddings):
        if not is_finite_as(embedding, dtype):
            bad[i] = ("non_finite_embedding", f"as {dtype}")
        elif dtype == "int8":
            error = int8_errors(embedding)
            least = float(error.cosine.min(initial=1.0))
            if least < min_cosine:
                bad[i] = ("quantisation_error", f"cosine {least:.4f} as int8")
            else:
                errors.append(error)
    empty = np.zeros((0, dim), np.float32)
    return [empty if i in bad else e for i, e in enumerate(embeddings)], bad, quantisation_counters(errors)


def int8_errors(embedding: np.ndarray) -> TokenErrors:
    """Of a finite float32 (n_tokens, dim) embedding as int8 with one scale a token."""
    return token_errors(restore(cast_embedding(embedding, "int8"), "int8"), embedding)


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


def quantisation_facts(counters: Mapping[str, float]) -> dict[str, float]:
    """Means and extremes over tokens, from the counters of one or more shards; empty without int8."""
    if "int8_tokens" not in counters:
        return {}
    return {
        "mean_cosine": counters["int8_cosine_sum"] / counters["int8_tokens"],
        "min_cosine": counters["int8_cosine_min"],
        "mean_relative_error": counters["int8_relative_error_sum"] / counters["int8_tokens"],
        "max_relative_error": counters["int8_relative_error_max"],
    }


def quantisation_line(facts: Mapping[str, float]) -> str:
    """The facts for people."""
    return (
        f"cosine to float32 {facts['mean_cosine']:.5f} mean, {facts['min_cosine']:.5f} least; "
        f"relative error {facts['mean_relative_error']:.2%} mean, {facts['max_relative_error']:.2%} greatest"
    )
