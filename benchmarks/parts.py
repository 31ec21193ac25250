"""Many drivers, one store: 10 million rows in 100 parts. Memory of a driver, its start, and the time to the manifest.

    python -m benchmarks.parts --out benchmarks/results/parts.json

Each part is a process of its own with the real precompute, its source, scheduler, ledger and leases; only the executor
is simulated: its workers commit records and (empty) files and take no time. Limits: 300 MiB for a driver, 10 s to its
first task, 60 s for `pipeline finish`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import report
from benchmarks.engine_run import peak_mib
from pipeline.executors.task import TaskRequest
from pipeline.options import Part, RunOptions
from pipeline.planning.simulated_executor import SimulatedCluster, SimulatedExecutor, SimulatedStage
from pipeline.stage import Stage
from pipeline.storage.record import CommittedFile, Record
from workflows.precompute import Precompute, PrecomputeConfig

FILES, SHARD = 100, 1000
MOST_MIB, MOST_START_S, MOST_FINISH_S = 300, 10, 60
NOTES = [
    "a list of URLs and captions in 100 Parquet files, in row groups of 65,536; shards of 1,000 rows; four files per "
    "shard (samples and three sizes of images), no encoder",
    "start_s: from the start of a driver's process to its first task: imports, configuration, division, digests; the "
    "first driver counts the rows, by footers",
    "finish_s: `finish_run` in a process of its own, without imports: sums, duplicates off, manifest, sweep of files "
    "that no record has; page cache warm",
    "the simulated workers write records and empty files at once and unsynced; the manifest is written as always",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/parts.json")
    parser.add_argument("--dir", type=Path, help="where to put the temporary files; default: the system's")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--parts", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=2, help="drivers at the same time")
    parser.add_argument("--driver", nargs=3, metavar=("FOLDER", "PART", "BEGAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.driver:
        folder, part, began = args.driver
        print(json.dumps(driver(Path(folder), part, float(began)) if part else finish(Path(folder))))
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        began = time.perf_counter()
        write_source(Path(folder) / "source", args.rows)
        made = time.perf_counter()
        with ThreadPoolExecutor(args.at_once) as threads:
            parts = [f"{part}/{args.parts}" for part in range(1, args.parts + 1)]
            drivers = list(threads.map(lambda part: in_process(folder, part), parts))
        worked = time.perf_counter()
        finished = in_process(folder, "")
    assert finished["samples"] == args.rows
    assert finished["shards"] == -(-args.rows // SHARD)
    row = {
        "rows": args.rows,
        "parts": args.parts,
        "at_once": args.at_once,
        "shards": finished["shards"],
        "driver_peak_mib": max(driver["peak_mib"] for driver in drivers),
        "first_start_s": drivers[0]["start_s"],
        "slowest_start_s": max(driver["start_s"] for driver in drivers),
        "median_driver_s": sorted(driver["seconds"] for driver in drivers)[len(drivers) // 2],
        "all_drivers_s": worked - made,
        "finish_s": finished["seconds"],
        "finish_peak_mib": finished["peak_mib"],
        "source_s": made - began,
    }
    ratios = {
        "largest driver / 300 MiB": max(row["driver_peak_mib"], row["finish_peak_mib"]) / MOST_MIB,
        "slowest start / 10 s": row["slowest_start_s"] / MOST_START_S,
        "finish / 60 s": row["finish_s"] / MOST_FINISH_S,
    }
    ratios = {name: round(value, 4) for name, value in ratios.items()}
    report("parts", [row], ratios, args.out, ["imagen-precompute", "pyarrow"], NOTES)


def write_source(folder: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    each = -(-rows // FILES)
    for number, first in enumerate(range(0, rows, each)):
        numbers = range(first, min(first + each, rows))
        urls = pa.array([f"https://images.example.com/{index:09d}.jpg" for index in numbers])
        captions = pa.array(
            [f"a photograph of scene {index * 7919 % rows:,} in the evening light" for index in numbers]
        )
        table = pa.table({"url": urls, "caption": captions})
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=65_536)


def in_process(folder: str, part: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.parts", "--driver", folder, part, str(time.time())]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{part or 'finish'}: {found}", file=sys.stderr)
    return found


def workflow(folder: Path) -> Precompute:
    source = {"kind": "urls", "path": str(folder / "source")}
    images = {"sizes_px": [64, 256, 1024]}
    settings = {"source": source, "shard_size": SHARD, "images": images, "encoders": [], "max_drop_fraction": 1.0}
    return Precompute(PrecomputeConfig.model_validate({**settings, "execution": {"disk_check": "warn"}}))


def driver(folder: Path, part: str, began: float) -> dict[str, float]:
    """Runs one part, and leaves the rest to `finish`."""
    made, cluster = workflow(folder), Cluster(folder / "run")
    with (
        mock.patch("pipeline.engine.parts.make_executor", return_value=cluster),
        mock.patch("pipeline.engine.parts._finish_if_last", return_value=None),
    ):
        summary = made.run(str(folder / "run"), RunOptions("inline", quiet=True, part=Part.parse(part)))
    assert summary["outcome"] == "finished"
    return {"start_s": cluster.first - began, "seconds": time.time() - began, "peak_mib": peak_mib()}


def finish(folder: Path) -> dict[str, float]:
    from imagen_core.store import load_manifest

    made, began = workflow(folder), time.perf_counter()
    made.finish(str(folder / "run"), RunOptions("inline", quiet=True))
    seconds, peak = time.perf_counter() - began, peak_mib()
    manifest = load_manifest(folder / "run/store")
    return {"seconds": seconds, "peak_mib": peak, "samples": manifest.num_samples, "shards": manifest.num_shards}


class Cluster(SimulatedExecutor):
    """Workers that write what real ones do, without content."""

    def __init__(self, run: Path):
        stages = [SimulatedStage(name, (), 0.0, 1.0, 0.0, {"cpus": 1.0}) for name in ("fetch", "resize")]
        super().__init__(stages, SimulatedCluster({"cpus": 16}, 16, 64))
        self.run = run
        self.first = 0.0

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        self.first = self.first or time.time()
        super().submit(stage, request)

    def records(self, request: TaskRequest) -> dict[str, Record]:
        found = dict(self._records(request))
        for group, record in found.items():
            write(self.run / record.file.path, "")
            write(self.run / f"state/{group}/{request.shard.name}.json", json.dumps(record.to_json(), indent=1))
        return found

    def _records(self, request: TaskRequest) -> Iterator[tuple[str, Record]]:
        shard = request.shard
        for group in sorted(request.wanted):
            folder = "staging" if group == "originals" else "store"
            file = CommittedFile(f"{folder}/{group}/{shard.name}.parquet", 0, "0" * 64)
            rows, print_of = shard.num_rows, request.fingerprints[group]
            yield group, Record(group, shard.index, print_of, shard.digest, rows, rows, files=(file,))


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
