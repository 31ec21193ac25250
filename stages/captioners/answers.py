"""The answers of shards that are not committed yet, in the run folder, so that no request is paid twice.

`captioners/NAME/SHARD.jsonl` has a line for each answer, with a digest: a line that was cut, or that was written for
another configuration or model, does not count. On an object store there are several such files for a shard.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from imagen_core.store import captions_group
from pipeline.storage import LocalStorage
from pipeline.storage.record import shard_of
from pipeline.storage.run_folder import RunFolder
from stages.captioners.base import Answer

_FOLDER = "captioners"
_GROUP_PREFIX = captions_group("a").removesuffix("a")
_PART_S = 10.0
"""How long answers wait at most, on an object store, before they are written."""


def folder_of(captioner: str) -> str:
    """The folder of a captioner in the run folder."""
    return f"{_FOLDER}/{captioner}"


@dataclass(slots=True)
class Kept:
    """What a shard has of earlier tries."""

    answers: dict[tuple[int, int], Answer] = field(default_factory=dict)
    """By row and attempt."""
    first_attempt: dict[int, int] = field(default_factory=dict)
    """Rows that are asked about again, from this attempt on."""
    bad: dict[int, tuple[str, str, int]] = field(default_factory=dict)
    """Rows without a good caption that are not asked about again: reason, detail, attempts."""
    good: dict[int, tuple[str, str | None, int]] = field(default_factory=dict)
    """Rows whose caption was committed before: the caption, its finish_reason, and the attempt that made it."""
    used: dict[str, float] = field(default_factory=dict)
    """Counters of what was committed before."""


class AnswerLog:
    """The answers of one shard."""

    def __init__(self, run: RunFolder, captioner: str, shard: str, identity: str):
        """
        Args:
            identity: digest of the configuration, the model and the samples; answers of others are left alone.
        """
        self._storage = run.storage
        self._name = f"{folder_of(captioner)}/{shard}"
        self._identity = identity
        self._file: int | None = None
        self._waiting: list[bytes] = []
        self._written = time.monotonic()

    def read(self) -> Kept:
        """What was kept."""
        kept = Kept()
        for name in names_of(self._storage, self._name):
            for line in _whole_lines(self._storage.read(name)):
                if line.pop("of", None) == self._identity:
                    _take(kept, line)
        return kept

    def add(self, row: int, attempt: int, answer: Answer) -> None:
        """Keeps an answer."""
        self.write({"row": row, "attempt": attempt, **asdict(answer)})

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        text = json.dumps({"of": self._identity, **line}, separators=(",", ":"))
        data = f"{_digest(text)} {text}\n".encode()
        if isinstance(self._storage, LocalStorage):
            if self._file is None:
                path = self._storage.root / f"{self._name}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                os.write(self._file, b"\n")  # ends a line that was cut
            os.write(self._file, data)
            return
        self._waiting.append(data)
        if time.monotonic() - self._written > _PART_S:
            self._write_part()

    def close(self) -> None:
        """Makes what was added durable."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
        self._write_part()

    def _write_part(self) -> None:
        if self._waiting:
            self._storage.write(f"{self._name}-{time.time_ns()}.jsonl", b"".join(self._waiting))
        self._waiting, self._written = [], time.monotonic()


def names_of(storage: Any, shard: str) -> list[str]:
    """The files of a shard's log, `captioners/NAME/SHARD`."""
    folder, _, stem = shard.rpartition("/")
    return sorted(f"{folder}/{n}" for n in storage.names(folder) if _stem(n) == stem)


def delete_answers(run: RunFolder, captioner: str, committed: set[int] | None = None) -> None:
    """Deletes the answers of committed shards, or of all."""
    for name in list(run.storage.names(folder_of(captioner))):
        shard = shard_of(f"{_stem(name)}.json")
        if shard is not None and (committed is None or shard in committed):
            run.storage.delete(f"{folder_of(captioner)}/{name}")


def delete_all_answers(run: RunFolder) -> None:
    """Deletes the answers of all captioners, committed or not: they may be about a removed image."""
    for group in run.started_groups():
        if group.startswith(_GROUP_PREFIX):
            delete_answers(run, group.removeprefix(_GROUP_PREFIX))


def kept_answers(run: RunFolder, captioner: str, skip: set[int]) -> Iterator[dict[str, Any]]:
    """All kept lines of shards other than some."""
    for name in list(run.storage.names(folder_of(captioner))):
        shard = shard_of(f"{_stem(name)}.json")
        if shard is not None and shard not in skip:
            yield from _whole_lines(run.storage.read(f"{folder_of(captioner)}/{name}"))


def _stem(name: str) -> str:
    return name.removesuffix(".jsonl").partition("-")[0] if name.endswith(".jsonl") else ""


def _whole_lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.decode("utf-8", "replace").splitlines():
        digest, _, text = line.partition(" ")
        if text and digest == _digest(text):
            yield json.loads(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _take(kept: Kept, line: dict[str, Any]) -> None:
    if "used" in line:
        kept.used = line["used"]
        return
    row = line.pop("row")
    if "first_attempt" in line:
        kept.first_attempt[row] = line["first_attempt"]
    elif "good" in line:
        caption, finish_reason, attempt = line["good"]
        kept.good[row] = (caption, finish_reason, attempt)
    elif "bad" in line:
        reason, detail, attempts = line["bad"]
        kept.bad[row] = (reason, detail, attempts)
    else:
        attempt, problem = line.pop("attempt"), line.pop("problem")
        kept.answers[row, attempt] = Answer(**line, problem=None if problem is None else (problem[0], problem[1]))
