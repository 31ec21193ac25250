"""Files that are never data, whatever they hold: hidden ones, and what systems leave beside the data."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

_SYSTEM = re.compile(
    r"__MACOSX|@eaDir|PaxHeaders?(\.\d+)?|GNUSparseFile\.\d+|lost\+found|\$RECYCLE\.BIN", re.IGNORECASE
)
_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))
_META = re.compile(r"__.*__")

HIDDEN = "hidden"
SYSTEM = "of the operating system"
META = "of webdataset (__NAME__)"
_OTHER = "of other suffixes"
_MOST_SUFFIXES = 20


def ignored_by_name(path: str) -> str | None:
    """The rule by which a file or folder is no data: the first that one of the names in its path falls under.

    None if it may be data. Hidden are names with a dot in front, so also the `._NAME` that macOS puts beside a NAME.
    """
    for name in path.split("/"):
        if name.startswith(".") and name not in (".", ".."):
            return HIDDEN
        if _SYSTEM.fullmatch(name) or name.lower() in _SYSTEM_FILES:
            return SYSTEM
    return None


def ignored_in_tar(path: str) -> str | None:
    """As `ignored_by_name`; in tars also the members that webdataset keeps for itself, such as `__meta__`."""
    rule = ignored_by_name(path)
    return META if rule is None and _META.fullmatch(path.rpartition("/")[2]) else rule


def suffix_rule(path: str, ignored: Mapping[str, int]) -> str:
    """The rule for a file whose suffix is none of those that are read; one rule for all beyond the first few."""
    suffix = PurePosixPath(path).suffix.lower()[:16]
    rule = f"{suffix} files" if suffix else "files without suffix"
    return rule if rule in ignored or len(ignored) < _MOST_SUFFIXES else _OTHER


def ignored_line(ignored: Mapping[str, int]) -> str:
    """For a person: how many files were ignored, by rule; empty if none was."""
    rules = ", ".join(f"{count:,} {rule}" for rule, count in sorted(ignored.items()) if count)
    return f"{sum(ignored.values()):,} files that are no data: {rules}" if rules else ""
