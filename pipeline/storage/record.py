"""Completion records: the files of each finished (group, shard), and what they were made from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.fingerprint import digest

_DIGEST = "digest"
_DIGITS = 5


def shard_name(index: int) -> str:
    """The name of a shard in file names and messages: its index, with at least five digits."""
    return f"{index:0{_DIGITS}d}"


def shard_of(file: str) -> int | None:
    """The index of the shard that a file name like 00012.r1.parquet belongs to; None for other names."""
    digits = file.partition(".")[0]
    return int(digits) if len(digits) >= _DIGITS and digits.isascii() and digits.isdigit() else None


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
    def from_json(cls, value: Any) -> "Record":
        """The record in a JSON value.

        Raises:
            ValueError: it is not one, or was changed since it was written.
        """
        try:
            fields = dict(value)
            written = fields.pop(_DIGEST, None)  # records of earlier versions have none
            if written not in (None, digest(fields)):
                raise ValueError("its digest is another")
            return cls(**{**fields, "files": tuple(CommittedFile(**file) for file in fields["files"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a record: {error}") from error

    @classmethod
    def found(cls, value: Any, group: str, shard: int | None) -> "Record | None":
        """The record in a JSON value; None if there is none, it is damaged, or one of another group or shard."""
        if value is None:
            return None
        try:
            record = cls.from_json(value)
        except ValueError:
            return None
        return record if record.group == group and shard in (None, record.shard) else None

    def to_json(self) -> dict[str, Any]:
        fields = json.loads(json.dumps(asdict(self)))  # as it will be read
        return {**fields, _DIGEST: digest(fields)}

    @property
    def file(self) -> CommittedFile:
        """The one file of a group that has one per shard."""
        assert len(self.files) == 1, f"{self.group}/{shard_name(self.shard)} has {len(self.files)} files"
        return self.files[0]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)
