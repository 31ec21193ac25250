"""docs/reference/coverage.md has every ability of the five systems, with code, tests and commands that exist."""

import re
import shlex
from dataclasses import dataclass

import pytest
import typer

from pipeline.cli.main import app
from tests.commands import call
from tests.named_tests import missing_tests, named_tests
from tests.runs import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "reference" / "coverage.md"
ABILITIES = {"N": 32, "P": 14, "D": 12, "M": 9, "G": 12}
"""How many each system has: NeMo Imagen, PaddleFleetX Imagen, DALLE2-pytorch, MinImagen, improved-diffusion."""


@dataclass(frozen=True)
class Row:
    id: str
    """Letter and number; a row with several abilities has lines N2a, N2b ..."""
    capability: str
    code: str
    test: str
    command: str


def rows() -> list[Row]:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if re.match(r"\| [A-Z]\d", line)]
    return [Row(*(cell.strip() for cell in row)) for row in cells]


ROWS = rows()
COMMANDS = sorted({command for row in ROWS for command in re.findall(r"`(pipeline [^`]+)`", row.command)})


def parsed(words: list[str]) -> dict[str, object]:
    """Values of the arguments and options of a command line; an error where it has what there is not."""
    command, name = typer.main.get_command(app), "pipeline"
    while not command.params or hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, words).params


def test_every_ability_of_every_system_has_a_row() -> None:
    wanted = {f"{letter}{number}" for letter, count in ABILITIES.items() for number in range(1, count + 1)}
    ids = [row.id for row in ROWS]
    assert {re.sub("[a-z]$", "", name) for name in ids} == wanted
    assert len(set(ids)) == len(ids)
    assert all(row.capability for row in ROWS)


def test_every_row_links_code_that_exists() -> None:
    for row in ROWS:
        links = re.findall(r"\]\(([^)]+)\)", row.code)
        assert links, row.id
        missing = [link for link in links if not (DOCUMENT.parent / link).is_file()]
        assert not missing, row.id


def test_every_row_names_a_test() -> None:
    assert [row.id for row in ROWS if not any(test for _, test in named_tests(row.test))] == []


def test_the_tests_named_exist() -> None:
    assert [f"{row.id}: {name}" for row in ROWS for name in missing_tests(row.test)] == []


def test_every_row_has_a_command() -> None:
    assert [row.id for row in ROWS if not re.search(r"`pipeline [^`]+`", row.command)] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_accepted_with_its_keys_and_values(line: str) -> None:
    words = shlex.split(line)[1:]
    arguments = parsed(words)
    if words[0] == "run":
        config = ["-c", str(arguments["config"])] if arguments["config"] else []
        result = call("config", "validate", str(arguments["workflow"]), *config, *arguments["overrides"])  # type: ignore[misc]
        assert result.code == 0, result.err
