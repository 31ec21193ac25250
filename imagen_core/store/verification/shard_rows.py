"""What the files of a shard are compared with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The samples of a shard, which its other files must agree with."""

    keys: list[str]
    sha256: list[str]
    captions: list[str]
    """The distinct captions, by caption id."""
    removed: frozenset[int]
    """Removed rows, which may be erased in all, some or none of the files."""
    removed_ids: frozenset[int]
    """Caption ids that only removed rows have."""
