"""Listing folders of other machines completely, or not at all."""

from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from imagen_core.far.calls import call


class PatientFileSystem(AbstractFileSystem):
    """The reading half of another file system, each of whose calls goes through `call`.

    fsspec's own walk leaves a folder out that could not be listed, and so do its `find` and `glob`; here they raise.
    Each method raises FileNotFoundError and StorageError, see `call`.
    """

    cachable = False

    def __init__(self, filesystem: Any) -> None:
        super().__init__()
        self._filesystem = filesystem
        self._strip_protocol = filesystem._strip_protocol

    def unstrip_protocol(self, name: str) -> str:
        return self._filesystem.unstrip_protocol(name)

    def invalidate_cache(self, path: str | None = None) -> None:
        self._filesystem.invalidate_cache(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return call(self._url(path), "listed", lambda: self._filesystem.ls(path, detail=detail, **kwargs))

    def info(self, path: str, **kwargs: Any) -> Any:
        return call(self._url(path), "read", lambda: self._filesystem.info(path, **kwargs))

    def exists(self, path: str, **kwargs: Any) -> bool:
        try:
            self.info(path, **kwargs)
        except FileNotFoundError:
            return False
        return True

    def isdir(self, path: str) -> bool:
        try:
            return call(self._url(path), "listed", lambda: self._filesystem.isdir(path))
        except FileNotFoundError:
            return False

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        inner = self._filesystem
        lists_at_once = isinstance(inner, AsyncFileSystem) and type(inner)._find is not AsyncFileSystem._find
        if maxdepth is not None or not lists_at_once:
            return super().find(path, maxdepth, withdirs, detail, **kwargs)
        return call(self._url(path), "listed", lambda: inner.find(path, withdirs=withdirs, detail=detail, **kwargs))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return call(self._url(path), "read", lambda: self._filesystem.cat_file(path, start, end, **kwargs))

    def _url(self, path: str) -> str:
        return self._filesystem.unstrip_protocol(path)
