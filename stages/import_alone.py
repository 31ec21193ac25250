"""Imports one module of a package, without all that the package's `__init__` imports.

img2dataset's `__init__` imports wandb, albumentations, pandas and Ray, and webdataset's imports torch: seconds of
processor time in each worker, for a module that uses none of it.
"""

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import LazyLoader, find_spec
from types import ModuleType

_PREFIX = "_alone_"
_lock = threading.RLock()


def import_alone(name: str, *, unused: Sequence[str] = ()) -> ModuleType:
    """The module `PACKAGE.MODULE`, whose relative imports are resolved and whose package's `__init__` does not run.

    It is a module of its own beside the one that `import PACKAGE.MODULE` gives. If it cannot be had alone, or the
    package is imported already, it is imported as usual.

    Args:
        unused: packages that the module imports, and of which it uses nothing as it is used here. They are loaded at
            their first use.
    Raises:
        ImportError: neither way works.
    """
    package, _, module = name.partition(".")
    with _lock:
        if package in sys.modules:
            return import_module(name)
        alone = _PREFIX + package
        try:
            return _import_from(alone, package, module, unused)
        except Exception:  # noqa: BLE001 - the package is another one than expected; if it is broken, the next line says so
            for loaded in [each for each in sys.modules if each == alone or each.startswith(f"{alone}.")]:
                del sys.modules[loaded]
            return import_module(name)


def _import_from(alone: str, package: str, module: str, unused: Sequence[str]) -> ModuleType:
    if alone not in sys.modules:
        spec = find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        stand_in = ModuleType(alone)
        stand_in.__path__ = list(spec.submodule_search_locations)
        sys.modules[alone] = stand_in
    lazy = _Lazy([each for each in unused if each not in sys.modules])
    sys.meta_path.insert(0, lazy)
    try:
        return import_module(f"{alone}.{module}")
    finally:
        sys.meta_path.remove(lazy)
        for each in lazy.found:  # whoever else imports it gets it as usual
            sys.modules.pop(each, None)


class _Lazy(MetaPathFinder):
    """Finds some packages as always, but loads them when an attribute of theirs is used."""

    def __init__(self, names: Sequence[str]):
        self.names = set(names)
        self.found: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        self.names.remove(fullname)  # so that the next line asks the other finders
        spec = find_spec(fullname)
        if spec is not None and isinstance(spec.loader, Loader):
            self.found.append(fullname)
            spec.loader = LazyLoader(spec.loader)
        return spec
