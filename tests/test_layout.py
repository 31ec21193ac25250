"""The house rules for the layout of the code: imports go one way, folders, files and functions stay small."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "stages", "imagen_core", "workflows")
MOST_FILES_PER_FOLDER = 16
MOST_LINES_PER_FILE = 429
LONG_FUNCTION_LINES = 60
MOST_LONG_FUNCTIONS = 6


def product_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_no_module_imports_itself_through_others_not_even_in_a_function_or_for_types() -> None:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imports.values())) > 1000, "the graph has the imports of all packages"
    assert circle(imports) == []


def test_a_circle_of_three_modules_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) in (
        ["a", "b", "c", "a"],
        ["b", "c", "a", "b"],
        ["c", "a", "b", "c"],
    )


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of an import circle, in order of import; empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_the_layers_of_the_packages_hold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)  # import-linter's turns off all other loggers
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_no_folder_holds_more_files_than_one_can_survey() -> None:
    folders: dict[Path, int] = {}
    for path in product_files():
        if path.name != "__init__.py":
            folder = path.parent.relative_to(ROOT)
            folders[folder] = folders.get(folder, 0) + 1
    assert {str(folder): count for folder, count in folders.items() if count > MOST_FILES_PER_FOLDER} == {}


def test_no_file_is_longer_than_430_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in product_files()}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES_PER_FILE} == {}


def test_at_most_six_functions_are_longer_than_60_lines() -> None:
    found = [name for path in product_files() for name in long_functions(path)]
    assert len(found) <= MOST_LONG_FUNCTIONS, found


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONG_FUNCTION_LINES:
                yield f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"
