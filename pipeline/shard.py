"""The unit of work: some rows of the input, held, compressed, or named as a range of a file."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, Protocol, Self

from pipeline.errors import StaleOutputError
from pipeline.fingerprint import canonical_json
from pipeline.storage.record import shard_name

_Cells = Mapping[str, bytes]


class RowRange(Protocol):
    """The rows of a shard as a place in a file, from which they can be read again. Small, and picklable."""

    @property
    def near(self) -> bool:
        """True if a worker reads the rows; else the driver does, once the shard is needed, and sends them."""
        ...

    def read(self) -> tuple[bytes, Mapping[str, bytes]]:
        """The rows as the canonical JSON of their list; and the cells of further columns, see `Shard.cells`."""
        ...


class Shard:
    """The unit of work, retry, commit and resume: a few hundred or thousand input rows.

    A shard of a table is a range of it and a digest. Where it holds its rows, they are compressed once the shard is
    admitted: a large cluster has a thousand shards in flight, and the URLs and captions of a row take some 450 bytes
    as Python objects, and a fifth of that compressed.
    """

    __slots__ = (
        "_cells",
        "_digest",
        "_packed",
        "_packed_cells",
        "_range",
        "_text",
        "cell_digests",
        "files",
        "index",
        "num_rows",
    )

    def __init__(self, index: int, rows: object, num_rows: int, files: Mapping[str, str] | None = None):
        """
        Args:
            index: position in the source, from 0.
            rows: what the source needs to read these rows; a JSON value.
            num_rows: their number.
            files: paths of the files that the rows name; not part of the digest, so that data may be moved.
        """
        self._set(index, canonical_json(rows).encode("utf-8", "surrogatepass"), num_rows, files)

    def _set(
        self,
        index: int,
        text: bytes | None,
        num_rows: int,
        files: Mapping[str, str] | None,
        digest: str | None = None,
        rows: RowRange | None = None,
        cell_digests: Mapping[str, str] | None = None,
    ) -> None:
        self.index = index
        self.num_rows = num_rows
        self.files = files or {}
        self._digest = hashlib.sha256(text or b"").hexdigest() if rows is None and digest is None else digest
        self.cell_digests: Mapping[str, str] = cell_digests or {}
        """Of the cells of further columns, by column; see `cells`."""
        self._text, self._packed, self._range = text, b"", rows
        self._cells: _Cells = {}
        self._packed_cells: _Cells = {}

    @classmethod
    def of_text(
        cls,
        index: int,
        text: bytes,
        num_rows: int,
        files: Mapping[str, str] | None = None,
        cells: _Cells | None = None,
    ) -> Self:
        """A shard whose rows, and cells of further columns, are canonical JSON already."""
        shard = cls.__new__(cls)
        shard._set(index, text, num_rows, files)
        shard.take_cells(cells or {})
        return shard

    @classmethod
    def of_range(
        cls,
        index: int,
        rows: RowRange,
        digest: str | None,
        num_rows: int,
        files: Mapping[str, str] | None = None,
        cell_digests: Mapping[str, str] | None = None,
    ) -> Self:
        """A shard whose rows and cells are read where they are needed, and compared with the digests.

        Args:
            digest: None where nobody has read the rows; the first who needs them or the digest makes it.
        """
        shard = cls.__new__(cls)
        shard._set(index, None, num_rows, files, digest, rows, cell_digests)
        return shard

    @property
    def digest(self) -> str:
        """Fingerprint of the input rows: SHA-256 of their canonical JSON."""
        if self._digest is None:
            self._read()
        assert self._digest is not None
        return self._digest

    def take_cells(self, cells: Mapping[str, bytes]) -> None:
        """Gives the shard the cells of further columns: by column the canonical JSON of their list."""
        self._cells, self.cell_digests = cells, _digests(cells)

    def pack(self) -> None:
        """Makes the shard small, and ready to travel to a worker."""
        if self._range is not None and not self._range.near:
            self._text, self._cells = self._read_range(self._range)
            self._range = None
        if self._text is not None:
            self._packed, self._text = zlib.compress(self._text, level=1), None
        if self._cells:
            self._packed_cells = {name: zlib.compress(text, level=1) for name, text in self._cells.items()}
            self._cells = {}

    @property
    def rows(self) -> Any:
        """Read or decompressed on each call.

        Raises:
            StaleOutputError: the file that they are in was changed since the digest was made.
        """
        return json.loads(self._read().decode("utf-8", "surrogatepass"))

    def _read(self) -> bytes:
        if self._text is not None:
            return self._text
        return zlib.decompress(self._packed) if self._range is None else self._read_range(self._range)[0]

    def _read_range(self, rows: RowRange) -> tuple[bytes, Mapping[str, bytes]]:
        text, cells = rows.read()
        digest, found = hashlib.sha256(text).hexdigest(), _digests(cells)
        if self._digest is None:
            self._digest, self.cell_digests = digest, found
        if digest != self._digest or any(found[column] != self.cell_digests.get(column, "") for column in found):
            raise StaleOutputError(
                f"source.path: the rows of shard {self.name} are no longer what they were: the source was changed "
                "while the run was at work, or keeps its size and time. Restore it, or run again with --check-input."
            )
        return text, cells

    def digest_of(self, column: str | None) -> str:
        """Fingerprint of the cells of a further column; of the rows, where the shard has no such cells."""
        digest = self.digest  # first, as reading the rows makes those of the cells too
        return digest if column is None else self.cell_digests.get(column, digest)

    def cells(self, column: str) -> list[Any]:
        """The cell of each row in a further column, which is no part of the digest of the rows, so that such a column
        can be added later. Read or decompressed on each call.

        Raises:
            KeyError: the shard has no cells of this column.
            StaleOutputError: the file that they are in was changed since the digest was made.
        """
        if self._range is not None:
            text = self._read_range(self._range)[1][column]
        else:
            packed = self._packed_cells.get(column)
            text = self._cells[column] if packed is None else zlib.decompress(packed)
        return json.loads(text.decode("utf-8", "surrogatepass"))

    def __reduce__(self) -> tuple[Any, ...]:
        self.pack()
        place = (self.index, self.num_rows, self.files, self._range)
        return _unpickled, (place, (self.digest, self._packed), (self.cell_digests, self._packed_cells))

    @property
    def name(self) -> str:
        return shard_name(self.index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Shard):
            return NotImplemented
        return (self.index, self.digest, self.files) == (other.index, other.digest, other.files)

    def __hash__(self) -> int:
        return hash((self.index, self.digest))


def _digests(cells: Mapping[str, bytes]) -> dict[str, str]:
    return {column: hashlib.sha256(text).hexdigest() for column, text in cells.items()}


def _unpickled(
    place: tuple[int, int, Mapping[str, str], RowRange | None],
    rows: tuple[str, bytes],
    cells: tuple[Mapping[str, str], Mapping[str, bytes]],
) -> Shard:
    index, num_rows, files, found = place
    (digest, packed), (cell_digests, packed_cells) = rows, cells
    shard = Shard.__new__(Shard)
    shard._set(index, None, num_rows, files, digest, found, cell_digests)
    shard._packed, shard._packed_cells = packed, packed_cells
    return shard
