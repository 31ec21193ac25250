"""What differs between two JSON values, in words."""

import json
from collections.abc import Mapping
from typing import Any


def changed_fields(old: Any, new: Any) -> list[str]:
    """`field: old -> new` for each leaf in which two JSON values differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{name}: {before.get(name, '(absent)')} -> {after.get(name, '(absent)')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{name}.{key}" if name else str(key))]
    return [(name or "value", json.dumps(value))]
