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

from imagen_core.far.ranges import has_ranges
from stages.sources.ignored import ignored_in_tar
from stages.sources.tarfiles.opening import Span, open_tar

log = logging.getLogger(__name__)

Members = dict[str, Span]
"""The members of a sample by suffix, as they are spelled."""

_HEAD_MEMBERS = 1000
_FAR_HEAD_MEMBERS = 16
_RECORD = tarfile.RECORDSIZE
_END_MARK = 2 * tarfile.BLOCKSIZE
_MOST_ZEROS = 2**20 + _END_MARK
"""At the end of a file: the largest records that GNU tar fills (`-b 2048`) and the end mark in front of it."""
_SEARCHED = 2**20
_MAGIC, _MAGIC_PLACE = b"ustar", 257
_SPECIAL = "links and devices in tars"
_DAMAGED = (tarfile.TarError, ValueError, OverflowError)  # what tarfile raises for damaged headers


class TarIndex:
    """The samples of one tar, which is read to its end.

    The key is the member's path up to a dot of its file name. The end of a tar is two blocks of zeros, and nothing but
    zeros or another tar (they were joined with `cat`) behind them. Behind what cannot be read, reading goes on at the
    next header whose checksum is right.

    Attributes:
        damage: what could not be read, and how many bytes; known after all samples.
        unread_bytes: how many bytes are neither members nor end marks; of a compressed tar that is damaged, how many
            bytes of the file at least were not used.
        cut: place of the member that the tar ends inside of, so that its sample is known to be incomplete.
        ignored: number of members that are no data, by rule.
    """

    def __init__(self, path: str, split_name: Callable[[str], tuple[str, str]], copy: str = ""):
        """
        Args:
            split_name: the key's last part and the suffix of a file name.
            copy: path of a copy to read in place of it.
        """
        self.path = path
        self._read_path = copy or path
        self._split_name = split_name
        self._reset()

    def _reset(self) -> None:
        self.damage = ""
        self.unread_bytes = 0
        self.cut: Span | None = None
        self.ignored: Counter[str] = Counter()
        self._first_damage, self._damaged_places = "", 0
        self._origin = self._end = 0

    def head(self) -> list[tuple[str, Members]]:
        """The first samples; of an object store few, as each takes a request."""
        most = _FAR_HEAD_MEMBERS if has_ranges(self._read_path) else _HEAD_MEMBERS
        found = list(islice(self._members(), most))
        samples = list(_neighbours(found))
        return samples[:-1] if len(found) == most and len(samples) > 1 else samples

    def samples(self) -> Iterator[tuple[str, Members]]:
        """All samples by their first members; those of a tar are on disk, so that memory is bounded.

        Members of a key belong to the same sample also if they do not follow each other. A suffix that comes twice
        starts another sample, so that no row vanishes uncounted.
        """
        with closing(sqlite3.connect("", check_same_thread=False)) as database:
            database.execute("CREATE TABLE samples (number INTEGER PRIMARY KEY, key BLOB, members TEXT)")
            database.execute("CREATE INDEX keys ON samples (key)")
            for key, members in _neighbours(self._members()):
                _add(database, key.encode("utf-8", "surrogatepass"), members)
            for key, text in database.execute("SELECT key, members FROM samples ORDER BY number"):
                members = {suffix: (offset, size) for suffix, (offset, size) in json.loads(text).items()}
                yield key.decode("utf-8", "surrogatepass"), members

    def _members(self) -> Iterator[tuple[str, str, Span]]:
        """Key, suffix and place of each member that may be data."""
        self._reset()
        with closing(open_tar(self._read_path)) as file:
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
                    base, suffix = self._split_name(name)
                    key = f"{folder}/{base}" if folder else base
                    yield key, suffix, (member.offset_data, member.size)
                start = None if self.cut else self._next_start(file)
            self._conclude(getattr(file, "damage", ""), getattr(file, "unread_bytes", 0))

    def _archive(self, file: BinaryIO, start: int) -> Iterator[tarfile.TarInfo]:
        """The members up to the end-of-archive blocks, or to the damage; `_end` is that place."""
        self._end, span = start, (start, 0)
        try:
            if file.seek(start) != start:
                return
            with tarfile.open(fileobj=cast(Any, file), mode="r:") as archive:
                while (member := archive.next()) is not None:
                    cast(Any, archive).members = []  # or the list of all headers would grow in memory
                    end = cast(Any, archive).offset
                    if end <= self._end:
                        raise tarfile.ReadError("its size is negative")
                    self._end, span = end, (member.offset_data, member.size)
                    yield member
        except _DAMAGED:
            if span[1] and not _has_byte(file, sum(span) - 1):
                self.cut = span
                self._note(f"it ends inside the member at byte {span[0]:,}")

    def _next_start(self, file: BinaryIO) -> int | None:
        """Where reading goes on behind an archive: at a joined one, or behind damage. None: the end of the file."""
        end = self._end
        at, is_end = _skip_zeros(file, end)
        zeros = at - end
        if is_end:
            if zeros < _END_MARK:
                self._note(f"it ends at byte {at:,} without an end mark" if at else "it is empty")
            elif zeros > _MOST_ZEROS:
                self._note(f"it ends with zeros from byte {end:,}", zeros)
            return None
        is_filled = zeros > _END_MARK and (at - self._origin) % _RECORD == 0
        is_marked = zeros == _END_MARK or is_filled
        found, size = _find_header(file, at if zeros else end + tarfile.BLOCKSIZE)
        if is_marked and found == at:
            self._origin = at
        elif is_marked:
            self._note(f"no tar behind the end mark at byte {end:,}", (size if found is None else found) - at)
        else:
            what = "zeros between members" if found == at else "no valid header"
            self._note(f"{what} at byte {end:,}", (size if found is None else found) - end)
        return found

    def _note(self, damage: str, unread_bytes: int = 0) -> None:
        self._first_damage = self._first_damage or damage
        self._damaged_places += 1
        self.unread_bytes += unread_bytes

    def _conclude(self, compressed_damage: str, compressed_unread: int) -> None:
        """Puts what was noted into `damage`."""
        parts: list[str] = []
        if compressed_damage:
            parts = [compressed_damage, f"{compressed_unread:,} compressed bytes were not read"]
        if self._damaged_places and (
            self.unread_bytes or not compressed_damage
        ):  # else the one follows from the other
            more = self._damaged_places - 1
            parts += [self._first_damage, *([f"{more:,} more such places"] if more else [])]
            parts.append(f"{self.unread_bytes:,} bytes were not read")
        self.unread_bytes += compressed_unread
        self.damage = "; ".join(parts)
        if self.damage:
            log.warning("%s is damaged (%s); its other samples are used", self.path, self.damage)


def _has_byte(file: BinaryIO, place: int) -> bool:
    return file.seek(place) == place and len(file.read(1)) == 1


def _skip_zeros(file: BinaryIO, start: int) -> tuple[int, bool]:
    """The first block at or behind `start` that is not all zeros; or the end of the file, and True."""
    at = start
    if file.seek(start) != start:
        return file.tell(), True
    while block := file.read(_RECORD):
        rest = block.lstrip(b"\0")
        if rest:
            return at + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE, False
        at += len(block)
    return at, True


def _find_header(file: BinaryIO, start: int) -> tuple[int | None, int]:
    """The first header at or behind `start`, at any byte; or None. And how far the file was read."""
    at, window = file.seek(start), b""
    while block := file.read(_SEARCHED):
        window += block
        magic = window.find(_MAGIC, _MAGIC_PLACE)
        while magic >= 0 and (place := magic - _MAGIC_PLACE) + tarfile.BLOCKSIZE <= len(window):
            if _is_header(window[place : place + tarfile.BLOCKSIZE]):
                return at + place, at + len(window)
            magic = window.find(_MAGIC, magic + 1)
        kept = max(0, len(window) - tarfile.BLOCKSIZE + 1)
        at, window = at + kept, window[kept:]
    return None, at + len(window)


def _is_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
    except (tarfile.HeaderError, ValueError, OverflowError):
        return False


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
