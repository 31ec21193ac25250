"""What does the input cost before the first shard: `plan`, an idle restart, a condition? Now and at an earlier commit.

Lists of URLs with captions are written as Parquet, csv and jsonl. Each command is a process of its own, whose
processor time (user and system, of it and its children) and largest memory the system tells: both hold under load,
where seconds do not. The earlier commit is unpacked into the work folder and reads the same files in the same round.
img2dataset's own reader cuts the same Parquet list into shards beside it.

The idle restart is one of a run with all shards finished, whose records are simulated: every file they name is there
and empty. Of conditions (`source.where`), the bytes that come from the Parquet file are counted where it is read. A
Parquet file of images is written in large and in small row groups: its first shard is planned and fetched.
What a round has measured stays in the work folder, and a further start goes on behind it.

    python -m benchmarks.input --earlier 1ec2329 --work evidence-run/input --out benchmarks/results/input.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
LIMITS = {
    ("plan of many", "cpu s"): 15,
    ("plan of many", "MB"): 300,
    ("idle restart of many", "cpu s"): 20,
    ("idle restart of many", "MB"): 400,
    ("first shard of many", "first shard s"): 10,
}
"""At most."""
WHERE_S = 60
"""A condition on the list of many rows takes at most so long."""
CONDITIONS = {
    "all rows": "shuffled >= 0",
    "a hundredth, sorted column": "number < {hundredth}",
    "a thousandth, unsorted column": "aesthetic >= 9.99",
    "one value, unsorted column": "shuffled = 7",
}
READ_TARGETS = {
    "plan of many, a hundredth, sorted column": " (at least 10)",
    "plan of many, one value, unsorted column": " (at least 10)",
}
"""Every row group has rows that the other condition keeps, so it saves no bytes."""
SHARD_SIZE = 1000
IMAGE_FILES = {"row groups of 100": (4000, 100), "one row group of 2,000": (2000, 2000), "one of 8,000": (8000, 8000)}
"""Rows, and rows of a row group, of Parquet files of images."""
IMAGE_BYTES = 100_000
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

WHERE = """
import sys
from stages.sources.records import parquet
count = 0
class Counted:
    def __init__(self, file):
        self.file = file
    def read(self, size=-1):
        global count
        data = self.file.read(size)
        count += len(data)
        return data
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def __getattr__(self, name):
        return getattr(self.file, name)
opened = parquet.open_file
parquet.open_file = lambda path: Counted(opened(path))
from pipeline.cli.main import main
try:
    main()
finally:
    print(count / 1e6)
"""

FETCH = """
import sys, tempfile
from pathlib import Path
from stages.sources.parquet import ParquetConfig
source = ParquetConfig(path=sys.argv[1]).build()
source.check()
shard = next(iter(source.shards(int(sys.argv[2]))))
found = []
with tempfile.TemporaryDirectory() as folder:
    rows = source.rows_of(shard) if hasattr(source, "rows_of") else None  # earlier: None for all
    source.fetch(shard, rows, Path(folder), lambda original: found.append(len(original.data)))
assert len(found) == int(sys.argv[2]) and min(found) > 1000
"""

IMG2DATASET = """
import sys, tempfile
from img2dataset.reader import Reader
with tempfile.TemporaryDirectory() as folder:
    print(sum(1 for _ in Reader(sys.argv[1], "parquet", "url", "caption", None, None, None, 1000, set(), folder)))
"""


def write_list(path: Path, rows: int, seed: int, *, numbered: bool = False) -> None:
    """A list of URLs and captions, written under another name first.

    Args:
        numbered: with the columns `number`, which is sorted, and `shuffled`, which has the same numbers in any order.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    numbers = np.random.default_rng(seed).permutation(rows) if numbered else None
    schema = _block(0, 1, seed, numbers).schema
    writers: dict[str, Callable[[], Any]] = {
        ".parquet": lambda: pq.ParquetWriter(part, schema),
        ".csv": lambda: pyarrow.csv.CSVWriter(part, schema),
        ".jsonl": lambda: part.open("w", encoding="utf-8"),
    }
    with writers[path.suffix]() as writer:
        for first in range(0, rows, _BLOCK):
            table = _block(first, min(_BLOCK, rows - first), seed, numbers)
            if path.suffix == ".jsonl":
                writer.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
            else:
                writer.write_table(table)
    _settle(part, path)


def _settle(part: Path, path: Path) -> None:
    old = time.time() - 3600
    os.utime(part, (old, old))
    part.rename(path)


def write_images(path: Path, rows: int, group_rows: int, seed: int) -> None:
    """A Parquet file of what might be compressed images; pages are of 1,024 rows or fewer, as pyarrow makes them."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    dice = np.random.default_rng(seed)
    images = [dice.bytes(IMAGE_BYTES) for _ in range(rows)]
    captions = [f"image {number}" for number in range(rows)]
    pq.write_table(pa.table({"image": images, "caption": captions}), part, row_group_size=group_rows)
    _settle(part, path)


def _block(first: int, rows: int, seed: int, numbers: np.ndarray | None) -> pa.Table:
    dice = np.random.default_rng((seed, first))
    words = np.array(_WORDS.split())
    captions = [" ".join(line) for line in words[dice.integers(0, len(words), (rows, 9))]]
    urls = [f"https://images.example.org/{name:016x}.jpg" for name in dice.integers(0, 2**63, rows)]
    scores = dice.uniform(0, 10, rows).round(3)
    more = {} if numbers is None else {"number": np.arange(first, first + rows), "shuffled": numbers[first:][:rows]}
    return pa.table({"url": urls, "caption": captions, "aesthetic": scores, **more})


def apart(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function gives in a process of its own: the memory of this one would count as that of all commands that
    it starts (Linux takes it over where they are executed)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments, **options).result()


def cost(command: list[str], checkout: Path, printed: str = "") -> dict[str, float]:
    """Processor time and time in seconds, and largest memory in MB, of a command; and what it prints last, a number
    with the name `printed`.

    Raises:
        SystemExit: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled modules, as installed packages have them
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: exit {process.returncode}\n{text[-3000:]}")
    found = {
        "cpu s": round(usage.ru_utime + usage.ru_stime, 2),
        "s": round(seconds, 2),
        "MB": round(usage.ru_maxrss / 1024),
    }
    return {**found, printed: round(float(text.split()[-1]), 2)} if printed else found


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
    from pipeline.workflow import ShardedWorkflow

    workflow = build("precompute", None, settings(path), str(out))
    assert isinstance(workflow, ShardedWorkflow)
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
    many = work / f"{args.many}-{args.seed}" / "numbered.parquet"
    for path, rows in [*((path, args.rows) for path in lists.values()), (many, args.many)]:
        apart(write_list, path, rows, args.seed, numbered=path == many)
        print(f"{path.parent.name}/{path.name}: {path.stat().st_size:,} bytes", flush=True)
    images = {
        name: work / f"images-{args.seed}" / f"{rows}-{size}.parquet" for name, (rows, size) in IMAGE_FILES.items()
    }
    for name, path in images.items():
        apart(write_images, path, *IMAGE_FILES[name], args.seed)
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
        rounds.add("first shard of many", number, lambda c=first: cost(c, ROOT, "first shard s"))
        for name, condition in CONDITIONS.items():
            where = f"source.where={condition.format(hundredth=args.many // 100)}"
            command = [sys.executable, "-c", WHERE, "plan", "precompute", "--out", str(work / "none")]
            command += [*settings(many), where]
            rounds.add(f"plan of many, {name}", number, lambda c=command: cost(c, ROOT, "MB read"))
        for name, path in images.items():
            for which, checkout in (("now", ROOT), ("earlier", earlier)):
                command = [sys.executable, "-c", FETCH, str(path), str(SHARD_SIZE)]
                rounds.add(f"a shard of images, {name}, {which}", number, lambda c=command, at=checkout: cost(c, at))
    out = work / f"run-{args.many}-{args.seed}"
    if not (out / "made.json").exists():
        (out / "made.json").write_text(json.dumps(apart(finish, many, out)))
    idle = pipeline(ROOT, "run", "precompute", "--out", str(out), "--executor", "inline", "--quiet", *settings(many))
    rounds.add("idle restart of many", args.rounds, lambda: cost(idle, ROOT))
    read = [*idle, "--check-input"]
    rounds.add("idle restart of many, --check-input", args.rounds, lambda: cost(read, ROOT))
    rows = [
        {
            "what": name,
            "rows": args.many if "many" in name else SHARD_SIZE if "images" in name else args.rows,
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
    ratios |= {
        f"{name}: {column} (at most {most})": rounds.median(name, column) for (name, column), most in LIMITS.items()
    }
    everything, *conditions = (f"plan of many, {name}" for name in CONDITIONS)
    for name in conditions:
        ratio = rounds.median(everything, "MB read") / rounds.median(name, "MB read")
        ratios[f"{name}: s (at most {WHERE_S})"] = rounds.median(name, "s")
        ratios[f"{name}: MB read without / with it{READ_TARGETS.get(name, '')}"] = round(ratio, 2)
    _, medium, large = (f"a shard of images, {name}" for name in IMAGE_FILES)
    for which, target in (("now", " (at most 1.1)"), ("earlier", "")):
        ratio = rounds.median(f"{large}, {which}", "MB") / rounds.median(f"{medium}, {which}", "MB")
        ratios[f"a shard of images, {which}: MB with a row group of 8,000 / of 2,000 rows{target}"] = round(ratio, 2)
    notes = (
        f"medians of {args.rounds} rounds; start-up of Python and its packages included",
        f"records of the idle restart: {(out / 'made.json').read_text()}, simulated",
    )
    report("input", rows, ratios, args.out, ["pyarrow", "img2dataset"], notes)


if __name__ == "__main__":
    main()
