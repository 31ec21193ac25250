"""A numeric probe: what an encoder made of a few fixed inputs, small enough to go wherever its embeddings go.

Hashes of files show that a model is the same; only its numbers show that a library computes the same with it. Of each
caption the token ids are kept, and of its first and last tokens the lengths of their embeddings and a sketch: random
projections of the embeddings, scaled to unit length, whose distance estimates that of the embeddings.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_core.store.encoder_identity import PROBE, Record
from imagen_core.store.errors import unreadable

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Relative error of a token between machines, devices and batches, by compute dtype: roundings of layers add up."""

_EDGE_TOKENS = 8
"""Tokens at the beginning and at the end of an input whose embeddings count."""
_NUMBERS = 32
"""Length of a sketch; the error of its estimate is 12 %."""
_SEED = 1
_DIGITS = 6


def probe_entry(name: str, ids: Sequence[int], embedding: np.ndarray) -> dict[str, Any]:
    """What is kept of one input: the same embedding gives the same entry on every machine.

    Args:
        name: the caption, or a name of another input.
        ids: its token ids; empty for other inputs.
        embedding: float32 (n_tokens, dim).
    """
    kept = np.concatenate([embedding[:_EDGE_TOKENS], embedding[_EDGE_TOKENS:][-_EDGE_TOKENS:]]).astype(np.float64)
    finite = np.asarray(np.isfinite(kept).all(axis=1))
    kept = np.where(finite[:, None], kept, 0.0)
    lengths = np.sqrt((kept**2).sum(axis=1))
    unit = kept / np.where(lengths > 0, lengths, 1.0)[:, None]
    random = np.random.RandomState(_SEED)  # its numbers are frozen, unlike those of a Generator
    sketch = np.zeros(_NUMBERS)
    for row in unit:
        sketch += row @ random.standard_normal((kept.shape[1], _NUMBERS))
    return {
        "input": name,
        "ids": list(ids),
        "lengths": [_rounded(length) if known else None for length, known in zip(lengths, finite, strict=True)],
        "sketch": [_rounded(number) for number in sketch / np.sqrt(_NUMBERS)],
    }


def parse_probe(data: bytes, file: str) -> dict[str, Any]:
    """A probe from its file.

    Raises:
        StoreError: it is not a probe.
    """
    try:
        probe = json.loads(data)
        if not isinstance(probe["environment"], dict):
            raise ValueError("environment is no mapping")
        if any(entry.keys() != {"input", "ids", "lengths", "sketch"} for entry in probe["inputs"]):
            raise ValueError("inputs should have input, ids, lengths and sketch")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(file, "a probe", error) from error
    return probe


def probe_differences(recorded: Mapping[str, Any], found: Mapping[str, Any], compute_dtype: str) -> list[str]:
    """One line for each input of two probes that differs by more than the rounding of `compute_dtype`.

    Args:
        recorded, found: probes, with `inputs` (of `probe_entry`) and `environment`.
    """
    tolerance = TOLERANCE.get(compute_dtype, max(TOLERANCE.values()))
    mine = {entry["input"]: entry for entry in found["inputs"]}
    lines = []
    for entry in recorded["inputs"]:
        other = mine.get(entry["input"])
        difference = None if other is None else _difference(entry, other, tolerance)
        if difference is not None:
            name = entry["input"]
            lines.append(f"probe: {name if len(name) <= 40 else name[:37] + '...'!r}: {difference}")
    return lines


def record_probe_differences(recorded: Record, found: Record) -> list[str]:
    """`probe_differences` of two records of one encoder; none if one of them has no probe."""
    if recorded is None or found is None or PROBE not in recorded or PROBE not in found:
        return []
    return probe_differences(recorded[PROBE], found[PROBE], str(recorded["fingerprint"].get("compute_dtype")))


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> str | None:
    if one["ids"] != other["ids"]:
        place = next((i for i, (a, b) in enumerate(zip(one["ids"], other["ids"], strict=False)) if a != b), None)
        where = "" if place is None else f", token {place} is {one['ids'][place]} -> {other['ids'][place]}"
        return f"{len(one['ids'])} tokens -> {len(other['ids'])} tokens{where}"
    if [length is None for length in one["lengths"]] != [length is None for length in other["lengths"]]:
        return "an embedding is not finite in one of them"
    lengths, others = (np.array([n for n in e["lengths"] if n is not None], np.float64) for e in (one, other))
    if not len(lengths):
        return None
    stretched = float((np.abs(others - lengths) / np.where(lengths > 0, lengths, 1.0)).max())
    turned = float(np.linalg.norm(np.subtract(one["sketch"], other["sketch"]))) / np.sqrt(len(lengths))
    error = max(stretched, turned)
    return None if error <= tolerance else f"embeddings differ by {error:.2%}; {tolerance:.2%} are allowed"


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
