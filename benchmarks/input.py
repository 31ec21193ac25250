"""What does the input cost before the first shard: `plan`, an idle restart? Now, and at an earlier commit.

Lists of URLs with captions are written as Parquet, csv and jsonl. Each command is a process of its own, whose
processor time (user and system, of it and its children) and largest memory the system tells: both hold under load,
where seconds do not. The earlier commit is unpacked into the work folder and reads the same files in the same round.
img2dataset's own reader cuts the same Parquet list into shards beside it.

The idle restart is one of a run with all shards finished, whose records are simulated: every file they name is there
and empty. What a round has measured stays in the work folder, and a further start goes on behind it.

    python -m benchmarks.input --earlier 1ec2329 --work evidence-run/input --out benchmarks/results/input.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks.common import report
from benchmarks.earlier import ROOT, unpack

FORMATS = ("parquet", "csv", "jsonl")
TARGETS = {"parquet": 15.0, "csv": 5.0, "jsonl": 5.0}
"""Processor time of `plan` at the earlier commit, over that now."""
SHARD_SIZE = 1000
_BLOCK = 100_000
_WORDS = 'a photo of the red fox blue house, old street "market" in snow at night with people'

FIRST_SHARD = """
import sys, time
began = time.perf_counter()
from pipeline.cli.config_commands import build
from pipeline.engine.input import record_input
from pipeline.engine.state import RunState
from pipeline.storage.run_folder import RunFolder
workflow = build("precompute", None, sys.argv[2:], sys.argv[1])
state = RunState.open(sys.argv[1], workflow.plan)
state.ledger.check_groups()
record_input(state)
shard, _ = next(state.ledger.finished(state.plan.shards()))
shard.pack()
print(time.perf_counter() - began)
"""

IMG2DATASET = """
import sys, tempfile
from img2dataset.reader import Reader
with tempfile.TemporaryDirectory() as folder:
    print(sum(1 for _ in Reader(sys.argv[1], "parquet", "url", "caption", None, None, None, 1000, set(), folder)))
"""


def write_list(path: Path, rows: int, seed: int) -> None:
    """A list of URLs and captions, written under another name first."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    writers: dict[str, Callable[[], Any]] = {
        ".parquet": lambda: pq.ParquetWriter(part, _block(0, 1, seed).schema),
        ".csv": lambda: pyarrow.csv.CSVWriter(part, _block(0, 1, seed).schema),
        ".jsonl": lambda: part.open("w", encoding="utf-8"),
    }
    with writers[path.suffix]() as writer:
        for first in range(0, rows, _BLOCK):
            table = _block(first, min(_BLOCK, rows - first), seed)
            if path.suffix == ".jsonl":
                writer.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
            else:
                writer.write_table(table)
    old = time.time() - 3600
    os.utime(part, (old, old))
    part.rename(path)


def _block(first: int, rows: int, seed: int) -> pa.Table:
    dice = np.random.default_rng((seed, first))
    words = np.array(_WORDS.split())
    captions = [" ".join(line) for line in words[dice.integers(0, len(words), (rows, 9))]]
    urls = [f"https://images.example.org/{name:016x}.jpg" for name in dice.integers(0, 2**63, rows)]
    scores = dice.uniform(0, 10, rows).round(3)
    return pa.table({"url": urls, "caption": captions, "aesthetic": scores})


def cost(command: list[str], checkout: Path, keep: bool = False) -> dict[str, float]:
    """Processor time in seconds and largest memory in MB of a command; what it prints last, with `keep`.

    Raises:
        SystemExit: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: exit {process.returncode}\n{text[-3000:]}")
    found = {"cpu s": round(usage.ru_utime + usage.ru_stime, 2), "MB": round(usage.ru_maxrss / 1024)}
    return {**found, "first shard s": round(float(text.split()[-1]), 2)} if keep else found


def pipeline(checkout: Path, *arguments: str) -> list[str]:
    """The command line of a checkout's `pipeline`."""
    module = "pipeline" if (checkout / "pipeline/__main__.py").exists() else "pipeline.cli"
    return [sys.executable, "-m", module, *arguments]


def settings(path: Path) -> list[str]:
    """A run of a list without encoders, whose groups are samples and two sizes."""
    return ["source.kind=urls", f"source.path={path}", f"shard_size={SHARD_SIZE}", "encoders=[]"]


def finish(path: Path, out: Path) -> int:
    """Makes all records of a run of a list, as if its shards were finished; returns how many.

    Its config, fingerprints and lists are what the engine writes.
    """
    from pipeline.cli.config_commands import build
    from pipeline.engine.input import record_input
    from pipeline.engine.state import RunState
    from pipeline.fingerprint import text_digest
    from pipeline.storage.record import CommittedFile, Record, shard_name

    workflow = build("precompute", None, settings(path), str(out))
    state = RunState.open(str(out), workflow.plan)
    assert state.plan.input is not None
    state.plan.input.begin_run()
    state.ledger.check_groups()
    record_input(state)
    groups = [name for name in state.plan.groups if name not in state.plan.transient_groups]
    folders = [out / state.run.group_folder(name) for name in groups] + [out / "state" / name for name in groups]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    empty = text_digest("")
    count = 0
    for shard in state.plan.shards():
        for name in groups:
            file = f"{state.run.group_folder(name)}/{shard_name(shard.index)}.parquet"
            (out / file).touch()
            rows = shard.num_rows
            record = Record(
                name,
                shard.index,
                state.plan.digests[name],
                shard.digest,
                rows,
                rows,
                {},
                (CommittedFile(file, 0, empty),),
            )
            (out / state.run.record_name(name, shard.name)).write_text(json.dumps(record.to_json()))
            count += 1
    return count


class Rounds:
    """Measurements by name, kept in a file."""

    def __init__(self, file: Path):
        self._file = file
        self.found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}

    def add(self, name: str, rounds: int, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures until there are so many rounds."""
        while len(self.found.setdefault(name, [])) < rounds:
            self.found[name].append(measure())
            self._file.write_text(json.dumps(self.found))
            print(f"{name}: {self.found[name][-1]}", flush=True)

    def median(self, name: str, column: str = "cpu s") -> float:
        return statistics.median(row[column] for row in self.found[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the lists that both commits plan")
    parser.add_argument("--many", type=int, default=10_000_000, help="of the list that only this commit reads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--earlier", default="1ec2329", help="a commit")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    earlier = work / f"commit-{args.earlier}"
    if not earlier.exists():
        unpack(args.earlier, earlier)
    rounds = Rounds(work / f"rounds-{args.rows}-{args.many}-{args.seed}.json")
    lists = {name: work / f"{args.rows}-{args.seed}" / f"l.{name}" for name in FORMATS}
    many = work / f"{args.many}-{args.seed}" / "l.parquet"
    for path, rows in [*((path, args.rows) for path in lists.values()), (many, args.many)]:
        write_list(path, rows, args.seed)
        print(f"{path.parent.name}/{path.name}: {path.stat().st_size:,} bytes", flush=True)
    for number in range(1, args.rounds + 1):
        for name, path in lists.items():
            for which, checkout in (("now", ROOT), ("earlier", earlier)):
                command = pipeline(checkout, "plan", "precompute", "--out", str(work / "none"), *settings(path))
                rounds.add(f"plan {name} {which}", number, lambda c=command, at=checkout: cost(c, at))
        peer = [sys.executable, "-c", IMG2DATASET, str(lists["parquet"])]
        rounds.add("img2dataset's shards parquet", number, lambda c=peer: cost(c, ROOT))
        command = pipeline(ROOT, "plan", "precompute", "--out", str(work / "none"), *settings(many))
        rounds.add("plan of many", number, lambda c=command: cost(c, ROOT))
        first = [sys.executable, "-c", FIRST_SHARD, str(work / f"fresh-{time.time_ns()}"), *settings(many)]
        rounds.add("first shard of many", number, lambda c=first: cost(c, ROOT, keep=True))
    out = work / f"run-{args.many}-{args.seed}"
    if not (out / "made.json").exists():
        (out / "made.json").write_text(json.dumps(finish(many, out)))
    idle = pipeline(ROOT, "run", "precompute", "--out", str(out), "--executor", "inline", "--quiet", *settings(many))
    rounds.add("idle restart of many", args.rounds, lambda: cost(idle, ROOT))
    read = [*idle, "--check-input"]
    rounds.add("idle restart of many, --check-input", args.rounds, lambda: cost(read, ROOT))
    rows = [
        {
            "what": name,
            "rows": args.many if "many" in name else args.rows,
            **{column: rounds.median(name, column) for column in found[0]},
        }
        for name, found in rounds.found.items()
    ]
    ratios = {
        f"plan {name}: earlier / now (at least {target:g})": round(
            rounds.median(f"plan {name} earlier") / rounds.median(f"plan {name} now"), 2
        )
        for name, target in TARGETS.items()
    }
    notes = (
        f"medians of {args.rounds} rounds; start-up of Python and its packages included",
        f"records of the idle restart: {(out / 'made.json').read_text()}, simulated",
    )
    report("input", rows, ratios, args.out, ["pyarrow", "img2dataset"], notes)


if __name__ == "__main__":
    main()
