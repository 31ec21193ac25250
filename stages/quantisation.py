"""What int8 costs: how far each stored token is from its float32 embedding, measured when it is written."""

from collections.abc import Mapping, Sequence

import numpy as np

from imagen_core.store import TokenErrors, cast_embedding, restore, token_errors


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
