"""Write the numbers of benchmarks/results/*.json into benchmarks/README.md, between its two markers.

python -m benchmarks.table
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def main() -> None:
    files = sorted((FOLDER / "results").glob("*.json"))
    sections = [section(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    put_between(FOLDER / "README.md", BEGIN, END, "\n".join(sections) or "No results yet.\n")


def put_between(document: Path, begin: str, end: str, body: str) -> None:
    """Replaces what a document has between two markers."""
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{document}: lacks {begin} or {end}")
    document.write_text(f"{before}{begin}\n\n{body}\n{end}{after}", encoding="utf-8")


def section(report: dict[str, Any]) -> str:
    """One script's results as Markdown."""
    hardware = report["hardware"]
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    results = report["results"]
    columns = list(dict.fromkeys(column for row in results for column in row))
    lines = [
        f"### {report['name']}",
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['ram_gib']} GiB. {versions}. "
        f"Commit {report['commit']}.",
        "",
        *(f"- {note}" for note in report.get("notes", ())),
        "",
        *table(["ratio", ""], [[name, value] for name, value in report["ratios"].items()]),
        "",
        "<details><summary>All numbers</summary>",
        "",
        *table(columns, [[row.get(column, "") for column in columns] for row in results]),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *([shown(value) for value in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def shown(value: Any) -> str:
    """A number with three digits that count; `|` would end a cell."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value).replace("|", "\\|")


if __name__ == "__main__":
    main()
