"""Makes packages installed ones of this process."""

import importlib
import sys
from pathlib import Path

from imagen_core import extensions
from tests.runs import REPOSITORY

PACKAGE = REPOSITORY / "tests" / "extension_package"
"""A package that adds one of each kind of part."""


class on_path:
    """Makes the packages of a folder the installed ones of this process too."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __enter__(self) -> None:
        sys.path.insert(0, self.folder)
        self._changed()

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self.folder)
        self._changed()

    @staticmethod
    def _changed() -> None:
        importlib.invalidate_caches()
        extensions._installed.cache_clear()
