"""Fingerprints: everything that a file depends on, as canonical JSON and its digest, with readable differences."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeGuard

_MAX_SHOWN = 200


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON, as 64 hex digits."""
    return text_digest(canonical_json(value))


def text_digest(text: str) -> str:
    """SHA-256 of a text, as 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def differences(old: object, new: object, path: str = "") -> list[str]:
    """One line per leaf that differs: `path: old -> new`; mappings in lists are compared by index."""
    if _are_mappings(old) and _are_mappings(new):
        old, new = ({str(number): group for number, group in enumerate(groups)} for groups in (old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}):
            inner = f"{path}.{key}" if path else str(key)
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), inner)
        return lines
    if canonical_json(old) == canonical_json(new):
        return []
    return [f"{path}: {_shown(old)} -> {_shown(new)}"]


def _are_mappings(value: object) -> TypeGuard[Sequence[Mapping[str, object]]]:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
