"""Is this commit as fast as an earlier one? Both run the same benchmarks at the same time, measuring in turn.

The earlier commit is unpacked beside this checkout and runs its own code and its own version of the benchmark script,
in processes of its own. The two hand a token back and forth, and only its holder measures: for a fraction of a second
of the store, one pass of the encoder, or one run of the engine. A slow spell of the machine so falls on both. Only the
rows of our own code are compared, and peers are left out where they can be; a ratio above 1 means that this commit is
faster.

    python -m benchmarks.earlier --commit 1ec2329 --out benchmarks/results/earlier.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import report

ROOT = Path(__file__).resolve().parents[1]


# Run in each checkout. What is timed takes its turn: it waits for the other's byte, then sends one.
IN_TURN = """
import importlib, os, sys, time
module, get, put = importlib.import_module("benchmarks." + sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
def take():
    if not os.read(get, 1):
        sys.exit("the other commit's benchmark has ended early")
def give():
    os.write(put, b"x")
def in_turn(measure):
    def measured(*arguments, **options):
        take()
        try:
            return measure(*arguments, **options)
        finally:
            give()
    return measured
class Clock:
    holds = False
    def perf_counter(self):  # called before and after what is timed
        if self.holds:
            now = time.perf_counter()
            give()
        else:
            take()
            now = time.perf_counter()
        self.holds = not self.holds
        return now
"""


@dataclass(frozen=True)
class Compared:
    """A benchmark, shortened, and which numbers of its rows are compared.

    Attributes:
        turns: Python statements that make what is timed take its turn, with `in_turn` or `Clock`.
        name: columns that name a row, joined.
        value: the column that is compared; a rate, or a time if `is_time`.
        ours: a row is compared if its name contains one of these.
    """

    module: str
    arguments: tuple[str, ...]
    turns: str
    name: tuple[str, ...]
    value: str
    ours: tuple[str, ...]
    is_time: bool = False


COMPARED = (
    Compared(
        "encode",
        ("--rounds", "9", "--captions", "64"),
        "module.matmul_flops = lambda dtype: 1.0\n"
        "module.fixed_batches = lambda *a: (lambda captions: None)\n"
        "module.time = Clock()",
        ("encoder",),
        "captions_per_s",
        ("ours",),
    ),
    Compared(
        "store",
        ("--rounds", "41", "--seconds", "0.05", "--captions", "1000"),
        "import benchmarks.common as common\ncommon.median_rate = in_turn(common.median_rate)",
        ("order", "reader"),
        "items_per_s",
        ("store", "loader"),
    ),
    Compared(
        "engine",
        ("--rounds", "5", "--tasks", "200", "--many", "200"),
        "module.Runs.measure = in_turn(module.Runs.measure)",
        ("what", "executor", "workers", "tasks"),
        "ms_per_task",
        ("engine local 1 200", "engine local 2 200", "engine ray 1 200", "engine ray 2 200"),  # those of all rounds
        is_time=True,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commit", required=True, help="the earlier commit")
    parser.add_argument("--only", help="a single benchmark: " + ", ".join(c.module for c in COMPARED))
    parser.add_argument("--out", type=Path, help="JSON report")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier" / "main"
        unpack(args.commit, earlier)
        (earlier.parent / "shared").symlink_to(ROOT.parent / "shared")  # real captions, if present
        for compared in COMPARED:
            if args.only in (None, compared.module):
                now, then = measure(compared, [ROOT, earlier], Path(folder))
                for name, value in now.items():
                    rows.append({"what": name, "now": round(value, 3), "earlier": round(then[name], 3)})
                    faster = then[name] / value if compared.is_time else value / then[name]
                    ratios[f"{name}: now / {args.commit}"] = round(faster, 3)
    notes = [f"the earlier commit: {args.commit}; each number is the median of the benchmark's rounds"]
    report("earlier", rows, ratios, args.out, ["torch", "ray", "pyarrow", "h5py"], notes)


def unpack(commit: str, folder: Path) -> None:
    """Writes the files of a commit into a new folder."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def measure(compared: Compared, checkouts: list[Path], folder: Path) -> list[dict[str, float]]:
    """Runs the benchmark in all checkouts in turn; for each, the compared values by the name of their rows."""
    pipes = [os.pipe() for _ in checkouts]
    running: list[subprocess.Popen[bytes]] = []
    for i, checkout in enumerate(checkouts):
        get, put = pipes[i][0], pipes[(i + 1) % len(pipes)][1]
        code = f"{IN_TURN}\n{compared.turns}\nmodule.main()"
        command = [sys.executable, "-c", code, compared.module, str(get), str(put), *compared.arguments]
        command += ["--out", str(folder / f"{compared.module}-{i}.json")]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        running.append(
            subprocess.Popen(command, cwd=checkout, env=environment, pass_fds=(get, put), stdout=subprocess.DEVNULL)
        )
    os.write(pipes[0][1], b"x")
    for _, write_end in pipes:
        os.close(write_end)  # so that a process ends if the other one fails
    codes = [process.wait() for process in running]
    for read_end, _ in pipes:
        os.close(read_end)
    if any(codes):
        raise SystemExit(f"benchmarks.{compared.module} failed")
    return [values(compared, folder / f"{compared.module}-{i}.json") for i in range(len(checkouts))]


def values(compared: Compared, written: Path) -> dict[str, float]:
    rows: list[dict[str, Any]] = json.loads(written.read_text(encoding="utf-8"))["results"]
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


if __name__ == "__main__":
    main()
