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
    readme = FOLDER / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{readme}: lacks {BEGIN} or {END}")
    files = sorted((FOLDER / "results").glob("*.json"))
    sections = [section(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    body = "\n".join(sections) or "No results yet.\n"
    readme.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}", encoding="utf-8")


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
