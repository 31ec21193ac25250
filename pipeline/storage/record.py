"""Completion records: the files of each finished (group, shard), and what they were made from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


def shard_name(index: int) -> str:
    """The name of a shard in file names and messages: its index, with at least five digits."""
    return f"{index:05d}"


@dataclass(frozen=True, slots=True)
class CommittedFile:
    """A finished file of a run."""

    path: str
    """Relative to the run folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a finished (group, shard). It is written last, so its files are complete."""

    group: str
    shard: int
    fingerprint: str
    """Digest of the group's fingerprint."""
    input: str
    """Digest of the input rows."""
    input_rows: int
    rows: int
    """Rows kept: input rows without the dropped ones."""
    drops: Mapping[str, int] = field(default_factory=dict)
    """Dropped rows by reason."""
    files: tuple[CommittedFile, ...] = ()
    counters: Mapping[str, float] = field(default_factory=dict)
    """See `GroupResult`, as for `info`."""
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Record":
        return cls(**{**value, "files": tuple(CommittedFile(**file) for file in value["files"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def file(self) -> CommittedFile:
        """The one file of a group that has one per shard."""
        assert len(self.files) == 1, f"{self.group}/{shard_name(self.shard)} has {len(self.files)} files"
        return self.files[0]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)
