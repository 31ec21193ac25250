"""Finds the tests that a document names, as `test_file.py::test_name`, in this folder."""

import ast
import re
from functools import cache
from pathlib import Path

_TESTS = Path(__file__).parent


def named_tests(text: str) -> list[tuple[str, str]]:
    """File and test of each `file.py::test` in backquotes; `::test` alone is of the file before it.

    A file may be named with the folders it is in. What stands in brackets behind a test (a parameter) is left out.
    A file alone has an empty test.
    """
    found, file = [], ""
    for name, test in re.findall(r"`((?:\w+/)*test_\w+\.py)?(?:::(\w+)(?:\[[^`]*\])?)?`", text):
        file = name or file
        if name or test:
            found.append((file, test))
    return found


def missing_tests(text: str) -> list[str]:
    """The tests named in a text that do not exist."""
    return ["::".join(filter(None, named)) for named in named_tests(text) if not _exists(*named)]


def _exists(file: str, test: str) -> bool:
    paths = [path for path in _files() if f"/{path}".endswith(f"/{file}")]
    return any(not test or test in _defined(path) for path in paths)


@cache
def _files() -> list[str]:
    return [path.relative_to(_TESTS).as_posix() for path in _TESTS.rglob("test_*.py")]


@cache
def _defined(path: str) -> set[str]:
    tree = ast.parse((_TESTS / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
