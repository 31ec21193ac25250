"""The fetched originals of a shard: a webdataset tar with one sample per row, including dropped rows.

Sample `ROW` has `ROW.json` (key, url, captions, drop reason, and the annotations of the image) and, if it was fetched,
`ROW.EXT` with the image's bytes as they came. Rows are in order of arrival; `OriginalsReader` sorts them.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from stages.images.exif_text import exif_with, orientation_in
from stages.import_alone import import_alone
from stages.sources.base import Original

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
)

_ALWAYS = ("key", "url", "captions", "reason", "detail", "exif")


def load_tar_writer() -> Any:
    """webdataset's `TarWriter`, without the rest of it, which imports torch."""
    return import_alone("webdataset.writer").TarWriter


class OriginalsWriter:
    """Writes originals as they arrive; one is in memory at a time."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._tar = load_tar_writer()(self._file, mtime=0, encoder=False)

    def write(self, original: Original) -> None:
        metadata = {
            "key": original.key,
            "url": original.url,
            "captions": list(original.captions or ()),
            "reason": original.reason,
            "detail": original.detail,
            **({} if original.orientation is None else {"exif": exif_with(original.orientation)}),
            **original.annotations,
        }
        sample: dict[str, object] = {
            "__key__": f"{original.row:08d}",
            "json": json.dumps(metadata).encode("ascii"),
        }
        if original.data is not None:
            sample[_suffix(original.data)] = original.data
        self._tar.write(sample)

    def close(self) -> None:
        self._tar.close()
        self._file.close()

    def __enter__(self) -> "OriginalsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class StoredOriginal(Original):
    """An original in the tar; its bytes stay there until `OriginalsReader.data` reads them."""

    captions: tuple[str, ...]
    offset: int = 0
    size: int = 0
    """Bytes of the image; 0 where there is none."""


class OriginalsReader:
    """Originals in row order; images are read one at a time."""

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("rb")
        self.entries: list[StoredOriginal] = sorted(read_originals(self._file), key=lambda entry: entry.row)

    def data(self, entry: StoredOriginal) -> bytes:
        """The image's bytes as fetched."""
        self._file.seek(entry.offset)
        return self._file.read(entry.size)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "OriginalsReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_originals(file: BinaryIO) -> Iterator[StoredOriginal]:
    """The originals of a tar in its order, each as soon as its metadata are read; images are skipped.

    Raises:
        tarfile.TarError, ValueError, KeyError: it is damaged.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for row, members in groupby(archive, key=lambda member: int(member.name.partition(".")[0])):
            values, offset, size = None, 0, 0
            for member in members:
                if member.name.endswith(".json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    values = json.load(content)
                else:
                    offset, size = member.offset_data, member.size
            if values is not None:
                yield _stored(row, values, offset, size)


def _stored(row: int, values: dict[str, Any], offset: int, size: int) -> StoredOriginal:
    return StoredOriginal(
        row,
        values["key"],
        values["url"],
        tuple(values["captions"]),
        reason=values["reason"],
        detail=values["detail"],
        annotations={
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name not in _ALWAYS
        },
        orientation=orientation_in(values.get("exif")),
        offset=offset,
        size=size,
    )


def _suffix(data: bytes) -> str:
    for magic, suffix in _MAGIC:
        if data.startswith(magic):
            return suffix
    return "webp" if data[8:12] == b"WEBP" else "bin"
