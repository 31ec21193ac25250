"""Compares two encoders of which one may have been recorded by an earlier version, which recorded less."""

from collections.abc import Mapping
from typing import Any

LATER_FIELDS = ("model_config", "tokenizer")
"""Fields of an encoder's fingerprint that stores and checkpoints of version 0.2 and before lack."""
Record = Mapping[str, Any] | None
PROBE = "probe"
"""Entry of an encoder's record: what it made of a few fixed captions."""


def comparable(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both fingerprints, without the later fields that one of them lacks: what is not recorded cannot differ."""
    skipped = {name for name in LATER_FIELDS if name not in recorded or name not in found}
    one, other = ({name: value for name, value in side.items() if name not in skipped} for side in (recorded, found))
    return one, other


def comparable_records(recorded: Record, found: Record) -> tuple[Record, Record]:
    """Two records of encoders (name, dim, dtype, fingerprint; None: there is none) likewise, without their probes,
    which are compared by a rule of their own."""
    if recorded is None or found is None:
        return recorded, found
    fingerprints = comparable(recorded["fingerprint"], found["fingerprint"])
    one, other = (
        {**{name: value for name, value in side.items() if name != PROBE}, "fingerprint": fingerprint}
        for side, fingerprint in zip((recorded, found), fingerprints, strict=True)
    )
    return one, other
