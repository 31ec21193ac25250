"""The documents of the repository, and the fenced blocks in them."""

from collections.abc import Iterable
from pathlib import Path

from tests.runs import REPOSITORY

DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]


def blocks(language: str, documents: Iterable[Path] = DOCUMENTS) -> list[str]:
    """The fenced blocks of this language in these documents; "" are blocks without a language."""
    found: list[str] = []
    for document in documents:
        inside: tuple[str, list[str]] | None = None
        for line in document.read_text("utf-8").splitlines():
            if not line.startswith("```"):
                if inside is not None:
                    inside[1].append(line)
            elif inside is None:
                inside = (line.removeprefix("```"), [])
            else:
                if inside[0] == language:
                    found.append("\n".join(inside[1]))
                inside = None
    return found


def python_blocks(document: Path) -> list[str]:
    return blocks("python", [document])
