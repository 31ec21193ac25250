"""Takes the numeric probe of a text encoder, and says how it differs from a recorded one."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from imagen_core.store import TOLERANCE, probe_differences, probe_entry, token_errors
from pipeline.fingerprint import differences
from stages.encoders.encoder import TextEncoder
from stages.encoders.recipes.cleaning import packages

OTHER_NUMBERS = "install the versions that the run started with, or start a new run"
STORE_TOLERANCE = {"float32": 0.0, "float16": 1e-3, "bfloat16": 4e-3}
"""Relative error of a token from rounding to the store's dtype."""
_LIBRARIES = ("torch", "transformers", "tokenizers")
_CAPTIONS = (
    "",
    "a",
    "A red square above a blue circle.",
    'HDR photo of 3 CATS,  "two-tone"; 50% off',
    "Été à Köln — café, ﬁne: 北京的一只猫 🐈 خط Привет",
)
_WORDS = (
    "a",
    "small",
    "wooden",
    "boat",
    "on",
    "the",
    "quiet",
    "lake",
    "beside",
    "old",
    "green",
    "mountains",
    "number",
)
_MOST_WORDS = 2000


def take_probe(encoder: TextEncoder) -> dict[str, Any]:
    """The encoder's probe: `inputs` (of `probe_entry`) and the `environment` they were encoded in.

    The inputs: the empty caption, short ones, one with characters of many scripts, one that is longer than max_tokens.
    """
    length = min(encoder.config.max_tokens + 8, _MOST_WORDS)
    captions = [*_CAPTIONS, " ".join(_WORDS[i % len(_WORDS)] for i in range(length))]
    inputs, _ = encoder.read(captions)
    ids = [each.ids for each in inputs]
    # One by one: a batch too large for the memory would lower the limit of all later ones.
    embeddings = [encoder.encode([caption]).embeddings[0] for caption in captions]
    return {
        "inputs": [probe_entry(*values) for values in zip(captions, ids, embeddings, strict=True)],
        "environment": _environment(encoder),
    }


def probe_problem(
    recorded: Mapping[str, Any], found: Mapping[str, Any], compute_dtype: str, *, most_lines: int = 3
) -> str | None:
    """What to say of an encoder whose probe differs from the recorded one by more than rounding; None if it agrees."""
    lines = probe_differences(recorded, found, compute_dtype)
    if not lines:
        return None
    changed = differences(recorded["environment"], found["environment"])
    return (
        f"the same model gives other numbers than when the embeddings were made: {'; '.join(lines[:most_lines])} "
        f"({len(lines)} of {len(recorded['inputs'])} probe captions differ; "
        f"{', '.join(changed) if changed else 'with the same versions of libraries, so the code was changed'})"
    )


def null_problem(stored: np.ndarray, found: np.ndarray, compute_dtype: str, dtype: str) -> str | None:
    """What to say of an encoder that encodes "" to other numbers than the stored ones; None if it does not.

    Args:
        stored, found: float (n_tokens, dim).
        dtype: of the store; "" is kept as float16 in a store of int8.
    """
    if stored.shape != found.shape:
        return f'"" is encoded to {found.shape} now, {stored.shape} when the run started'
    allowed = TOLERANCE[compute_dtype] + STORE_TOLERANCE.get(dtype, STORE_TOLERANCE["float16"])
    error = float(token_errors(stored, found).relative.max(initial=0.0))
    if error <= allowed:
        return None
    return f'the encoding of "" differs by {error:.2%} from when the run started; {allowed:.2%} are allowed'


def _environment(encoder: TextEncoder) -> dict[str, str]:
    """Versions of the libraries that clean captions and compute embeddings, the kind of attention, and the device."""
    import torch

    device = encoder.device
    return {
        **{library: version(library) for library in (*_LIBRARIES, *packages(getattr(encoder.config, "cleaning", ())))},
        "attention": getattr(encoder.model, "attention", "its own"),
        "device": platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
