"""The samples of webdataset tars: found by headers alone, never unpacked."""

import json
import logging
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, BinaryIO, cast

from stages.sources.ignored import ignored_in_tar
from stages.sources.tarfiles.opening import Span, open_tar

log = logging.getLogger(__name__)

Members = dict[str, Span]
"""The members of a sample by suffix, as they are spelled."""

_HEAD_MEMBERS = 1000
_BLOCKS = 20 * tarfile.BLOCKSIZE
_SPECIAL = "links and devices in tars"
_TRAILING = "behind the end of a tar"
_DAMAGED = (tarfile.TarError, ValueError, OverflowError)  # what tarfile raises for damaged headers


class TarIndex:
    """The samples of one tar.

    The key is the member's path up to a dot of its file name. Tars joined with `cat` are read to their end.

    Attributes:
        damage: why the tar could not be read to its end; known after all samples.
        is_cut: True if the tar ends inside a member, so that the sample of that member is known to be incomplete.
        ignored: number of members that are no data, by rule.
    """

    def __init__(self, path: str, split_name: Callable[[str], tuple[str, str]]):
        """
        Args:
            split_name: the key's last part and the suffix of a file name.
        """
        self.path = path
        self.damage = ""
        self.is_cut = False
        self.ignored: Counter[str] = Counter()
        self.last_suffix = ""
        self._split_name = split_name

    def head(self) -> list[tuple[str, Members]]:
        """The first samples."""
        found = list(islice(self._members(), _HEAD_MEMBERS))
        samples = list(_neighbours(found))
        return samples[:-1] if len(found) == _HEAD_MEMBERS and len(samples) > 1 else samples

    def samples(self) -> Iterator[tuple[str, Members]]:
        """All samples by their first members; those of a tar are on disk, so that memory is bounded.

        Members of a key belong to the same sample also if they do not follow each other. A suffix that comes twice
        starts another sample, so that no row vanishes uncounted.
        """
        with closing(sqlite3.connect("")) as database:
            database.execute("CREATE TABLE samples (number INTEGER PRIMARY KEY, key BLOB, members TEXT)")
            database.execute("CREATE INDEX keys ON samples (key)")
            for key, members in _neighbours(self._members()):
                _add(database, key.encode("utf-8", "surrogatepass"), members)
            for key, text in database.execute("SELECT key, members FROM samples ORDER BY number"):
                members = {suffix: (offset, size) for suffix, (offset, size) in json.loads(text).items()}
                yield key.decode("utf-8", "surrogatepass"), members

    def _members(self) -> Iterator[tuple[str, str, Span]]:
        """Key, suffix and place of each member that may be data."""
        self.damage, self.is_cut, self.ignored = "", False, Counter()
        with closing(open_tar(self.path)) as file:
            start: int | None = 0
            while start is not None:
                for member in self._archive(file, start):
                    if member.isdir():
                        continue
                    rule = ignored_in_tar(member.name) or (None if member.isfile() else _SPECIAL)
                    if rule is not None:
                        self.ignored[rule] += 1
                        continue
                    folder, _, name = member.name.rpartition("/")
                    base, self.last_suffix = self._split_name(name)
                    key = f"{folder}/{base}" if folder else base
                    yield key, self.last_suffix, (member.offset_data, member.size)
                start = None if self.damage else self._next_archive(file, start)
            self.damage = self.damage or getattr(file, "damage", "")
        if self.damage:
            log.warning("%s is damaged (%s); the samples before that place are used", self.path, self.damage)

    def _archive(self, file: BinaryIO, start: int) -> Iterator[tarfile.TarInfo]:
        """The members up to the end-of-archive blocks, or to the damage; `_end` is that place."""
        self._end = start
        try:
            if file.seek(start) != start:
                return
            with tarfile.open(fileobj=cast(Any, file), mode="r:") as archive:
                while (member := archive.next()) is not None:
                    cast(Any, archive).members = []  # or the list of all headers would grow in memory
                    end = cast(Any, archive).offset
                    if end <= self._end:
                        raise tarfile.ReadError(f"a header at byte {self._end:,} names a negative size")
                    self._end = end
                    yield member
        except _DAMAGED as error:
            self.is_cut = "unexpected end of data" in str(error)
            self.damage = str(error) or type(error).__name__

    def _next_archive(self, file: BinaryIO, start: int) -> int | None:
        """Where the next of several joined tars starts; None at the end of the file."""
        at = end = self._end
        if file.seek(end) != end:
            return None
        while block := file.read(_BLOCKS):
            rest = block.lstrip(b"\0")
            if not rest:
                at += len(block)
                continue
            at += (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            if at > end:
                return at
            if start == end and start > 0:  # behind the end-of-archive blocks of the tar before
                self.ignored[_TRAILING] += 1
            else:
                self.damage = f"no header at byte {at:,}"
            return None
        return None


def _neighbours(members: Iterable[tuple[str, str, Span]]) -> Iterator[tuple[str, Members]]:
    """The members of a key that follow each other; a suffix that comes twice starts another sample."""
    key: str | None = None
    found: Members = {}
    for this, suffix, span in members:
        if key is not None and (this != key or suffix in found):
            yield key, found
            found = {}
        key = this
        found[suffix] = span
    if key is not None:
        yield key, found


def _add(database: sqlite3.Connection, key: bytes, members: Members) -> None:
    """Adds members to the last sample of their key, if it has none of their suffixes; else as another sample."""
    query = "SELECT number, members FROM samples WHERE key = ? ORDER BY number DESC LIMIT 1"
    for number, text in database.execute(query, (key,)).fetchall():
        known = json.loads(text)
        if not known.keys() & members.keys():
            text = json.dumps({**known, **members})
            database.execute("UPDATE samples SET members = ? WHERE number = ?", (text, number))
            return
    database.execute("INSERT INTO samples (key, members) VALUES (?, ?)", (key, json.dumps(members)))
