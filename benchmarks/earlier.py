"""Is this commit as fast as an earlier one? Both run the same benchmarks in turn, on the same machine.

The earlier commit is unpacked beside this checkout and runs its own code and its own version of the benchmark script,
in processes of its own. Only the rows of our own code are compared; a ratio above 1 means that this commit is faster.

    python -m benchmarks.earlier --commit 1ec2329 --out benchmarks/results/earlier.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import report

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Compared:
    """A benchmark, shortened, and which numbers of its rows are compared.

    Attributes:
        name: columns that name a row, joined.
        value: the column that is compared; a rate, or a time if `is_time`.
        ours: a row is compared if its name contains one of these.
    """

    module: str
    arguments: tuple[str, ...]
    name: tuple[str, ...]
    value: str
    ours: tuple[str, ...]
    is_time: bool = False


COMPARED = (
    Compared("encode", ("--rounds", "1", "--captions", "256"), ("encoder",), "captions_per_s", ("ours",)),
    Compared("store", ("--rounds", "2", "--seconds", "0.2"), ("order", "reader"), "items_per_s", ("store", "loader")),
    Compared(
        "engine",
        ("--rounds", "1", "--tasks", "300", "--many", "300"),
        ("what", "executor", "workers", "tasks"),
        "ms_per_task",
        ("engine local", "engine ray"),
        is_time=True,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commit", required=True, help="the earlier commit")
    parser.add_argument("--rounds", type=int, default=5, help="times each of the two runs each benchmark")
    parser.add_argument("--only", help="a single benchmark: " + ", ".join(c.module for c in COMPARED))
    parser.add_argument("--out", type=Path, help="JSON report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        earlier, scratch = Path(folder) / "earlier" / "main", Path(folder) / "report.json"
        unpack(args.commit, earlier)
        (earlier.parent / "shared").symlink_to(ROOT.parent / "shared")  # real captions, where they are
        found: dict[str, dict[str, list[float]]] = {}
        for compared in COMPARED:
            if args.only in (None, compared.module):
                for round_ in range(args.rounds):
                    checkouts = {"now": ROOT, "earlier": earlier}
                    for side in sorted(checkouts, reverse=bool(round_ % 2)):  # whoever is first is so every other time
                        for name, value in measure(compared, checkouts[side], scratch).items():
                            found.setdefault(name, {}).setdefault(side, []).append(value)
    rows = [
        {
            "what": name,
            "now": round(statistics.median(v["now"]), 3),
            "earlier": round(statistics.median(v["earlier"]), 3),
        }
        for name, v in found.items()
    ]
    ratios = {f"{name}: now / {args.commit}": round(ratio(v, name), 3) for name, v in found.items()}
    report(
        "earlier", rows, ratios, args.out, ["torch", "ray", "pyarrow", "h5py"], [f"the earlier commit: {args.commit}"]
    )


def unpack(commit: str, folder: Path) -> None:
    """Writes the files of a commit into a new folder."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def measure(compared: Compared, checkout: Path, scratch: Path) -> dict[str, float]:
    """Runs the benchmark in a checkout; the compared values by the name of their rows."""
    command = [sys.executable, "-m", f"benchmarks.{compared.module}", *compared.arguments, "--out", str(scratch)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows: list[dict[str, Any]] = json.loads(scratch.read_text(encoding="utf-8"))["results"]
    named = {
        " ".join(str(row[column]) for column in compared.name): row[compared.value]
        for row in rows
        if compared.value in row
    }
    return {
        f"{compared.module}, {'ms per task' if compared.is_time else 'rate'}: {name}": value
        for name, value in named.items()
        if any(name.startswith(prefix) or f" {prefix}" in name for prefix in compared.ours)
    }


def ratio(values: dict[str, list[float]], name: str) -> float:
    """Median over the rounds of how much faster this commit is."""
    pairs = zip(values["now"], values["earlier"], strict=True)
    return statistics.median(b / a if "ms per task" in name else a / b for a, b in pairs)


if __name__ == "__main__":
    main()
