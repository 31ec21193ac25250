"""What differs between two JSON values, in words."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any


def changed_fields(old: Any, new: Any) -> list[str]:
    """`field: old -> new` for each leaf in which two JSON values differ."""
    return [
        f"{name}: {before or '(absent)'} -> {after or '(absent)'}" for name, (before, after) in differing((old, new))
    ]


def differing(values: Sequence[Any]) -> list[tuple[str, tuple[str | None, ...]]]:
    """Each leaf in which JSON values are not all the same, by name: its JSON text in each, None where it is absent."""
    leaves = [dict(_leaves(value)) for value in values]
    rows = ((name, tuple(each.get(name) for each in leaves)) for name in sorted({*chain(*leaves)}))
    return [(name, row) for name, row in rows if len({*row}) > 1]


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{name}.{key}" if name else str(key))]
    return [(name or "value", json.dumps(value))]
