"""Embeddings that come with the data, in .npy files with one row per sample: `source.arrays`."""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import xxhash

from pipeline.config import Config
from pipeline.errors import ConfigError
from stages.sources.arrays.npy import NpyHeader, read_header, read_row
from stages.sources.files import Damaged, base_folder, find_files
from stages.sources.records.far import open_file

_ENDS_BYTES = 2**16


class FolderArrayConfig(Config):
    """A folder of .npy files, one for each table or tar."""

    folder: str
    """The folder, local or any fsspec URL. Each .npy is (rows, dim), or (rows, tokens, dim), and belongs to the file
    with the same number at the end of its name: img_emb_0007.npy to metadata_0007.parquet, or to 00007.tar."""


class ArrayFolder:
    """The .npy files of one of the source's arrays."""

    def __init__(self, name: str, folder: str):
        self.field = f"source.arrays.{name}"
        self.folder = folder
        self._opened: tuple[str, NpyHeader, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @cached_property
    def files(self) -> dict[int, str]:
        """Path of each .npy by its number."""
        base = base_folder(self.folder)
        found: dict[int, str] = {}
        for name in find_files(self.folder, self.field, ("npy",)):
            number = number_of(name)
            if number is None or number in found:
                problem = "has no number at its end" if number is None else f"has the number of {found[number]}"
                raise ConfigError(f"{self.field}: {base}/{name} {problem}; name the files as img_emb_0007.npy")
            found[number] = f"{base}/{name}"
        return found

    def file_of(self, path: str) -> str:
        """The .npy that belongs to a table or tar.

        Raises:
            ConfigError: there is none.
        """
        number = number_of(path)
        if number is None:
            raise ConfigError(f"{self.field}: {path} has no number at its end, so no .npy can be found for it")
        if number not in self.files:
            raise ConfigError(
                f"{self.field}: {path} has no .npy with the number {number} in {self.folder} (of {len(self.files)}); "
                "add the file, or leave out the files without one by a glob in source.path"
            )
        return self.files[number]

    def check(self, paths: Iterable[str]) -> None:
        """Checks that each table or tar has its own .npy.

        Raises:
            ConfigError: one has none, or two have the same.
        """
        owners: dict[str, str] = {}
        for path in paths:
            file = self.file_of(path)
            if owners.setdefault(file, path) != path:
                raise ConfigError(
                    f"{self.field}: {owners[file]} and {path} have the same number, so {file} would be of both; "
                    "rename one, or make a run of each folder"
                )

    def num_rows_and_digest(self, path: str) -> tuple[int, str]:
        """Rows of the .npy of a table or tar, and a digest of its size, header and ends.

        Raises:
            ConfigError: there is none, or it is not a complete .npy of numbers.
        """
        file = self.file_of(path)
        header, opened = self._open(file)
        size = opened.seek(0, 2)
        opened.seek(0)
        head = opened.read(_ENDS_BYTES)
        opened.seek(max(0, size - _ENDS_BYTES))
        return header.shape[0], f"{size}-{xxhash.xxh3_64_hexdigest(head + opened.read())}"

    def check_rows(self, path: str, rows: int) -> str:
        """The digest of the .npy, which must have exactly the rows of its table or tar.

        Raises:
            ConfigError: with both numbers.
        """
        found, digest = self.num_rows_and_digest(path)
        if found != rows:
            raise ConfigError(
                f"{self.field}: {self.file_of(path)} has {found:,} rows, but {path} has {rows:,} samples; they "
                "must be aligned row by row, so make the one again from the other"
            )
        return digest

    def read(self, path: str, row: int) -> tuple[str, np.ndarray]:
        """A row of the .npy of a table or tar, after its name for errors."""
        file = self.file_of(path)
        header, opened = self._open(file)
        return f"{file} row {row}", read_row(opened, header, row)

    def _open(self, file: str) -> tuple[NpyHeader, Any]:
        if self._opened is None or self._opened[0] != file:
            self.close()
            opened = open_file(file)
            try:
                header = read_header(opened, f"{self.field}: {file}")
                size = opened.seek(0, 2)
                if len(header.shape) < 2 or size != header.num_bytes:
                    raise Damaged(f"{size:,} bytes, shape {header.shape}, which takes {header.num_bytes:,}")
            except Damaged as error:
                opened.close()
                raise ConfigError(
                    f"{self.field}: {file} is not a complete .npy of (rows, dim): {error}; write it again"
                ) from error
            except BaseException:
                opened.close()
                raise
            self._opened = (file, header, opened)
        return self._opened[1:]

    def close(self) -> None:
        """Closes the file that is open."""
        if self._opened is not None:
            self._opened[2].close()
            self._opened = None


def no_array(name: str, present: Iterable[str]) -> ConfigError:
    """The error for an array that the source does not have."""
    return ConfigError(
        f"encoders: array {name!r} is not in source.arrays, which has: {', '.join(present) or 'none'}; add it there"
    )


def number_of(path: str) -> int | None:
    """The digits at the end of a file's name."""
    found = re.search(r"\d+$", PurePosixPath(path).stem.removesuffix(".tar"))
    return int(found[0]) if found else None
