"""Does the scheduler keep a large cluster busy, and what does it cost? 100,000 shards on a clock that does not wait.

    python -m benchmarks.simulate --out benchmarks/results/simulate.json

The real scheduler runs 100,000 shards of 4,000 pairs (400 million) on 448 simulated CPU processes and 64 GPU workers
of 8 nodes; see simulate_run.py. Limits: the time the encoders need if they are never idle; 500 MiB; 60 s.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.simulate_run import ENCODE_FLOP, PROFILE, ROWS, SIGMA, STATIONS

SCENARIOS = ("calm", "1% failing", "nodes come and go, 1% failing", "calm, files written", "all finished")
NOTES = [
    f"a shard of {ROWS:,} pairs takes " + ", ".join(f"{s.name} {s.seconds(ROWS):.1f} s" for s in STATIONS) + ": the "
    f"measured and assumed numbers of the profile l4x1, and {ENCODE_FLOP / 1e9:.0f} GFLOP a caption; times are "
    f"lognormal of mean 1 and sigma {SIGMA} (assumed); workers first load for "
    f"{STATIONS[0].start_s:.0f} and {PROFILE.model_start_s:.0f} s",
    "1% failing: of all attempts, somewhere in their time, and each 10,000th shard whenever it is resized",
    "nodes: each 30 minutes one of 8 is lost with all it runs, its successor comes 20 minutes later",
    "scheduling_s: processor time of scheduler, ledger, tally and event log; the simulation's own is taken off in "
    "proportion to the wall time inside it",
    "files written: the simulated workers write records and (empty) data files, so that the next run, all finished, "
    "reads real ones; page cache warm, files not synced",
    "of_ideal: encoder seconds there were / those of the tasks that succeeded; last_percent_s: from 99 % of the "
    "shards finished to all",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/simulate.json")
    parser.add_argument("--dir", type=Path, help="where to put the temporary files; default: the system's")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for name in args.only:
            kept = name in ("calm, files written", "all finished")
            rows[name] = run(name, args.shards, Path(folder) / ("written" if kept else name))
            print(f"{name}: {rows[name]}", file=sys.stderr)
    results = [{"scenario": name, **row} for name, row in rows.items()]
    report("simulate", results, ratios(rows), args.out, ["imagen-precompute"], NOTES)


def run(name: str, shards: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.simulate_run", name, str(shards), str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, row in rows.items():
        if "encoders_useful" in row:
            result[f"{name}: encoder seconds used / there were"] = row["encoders_useful"]
            result[f"{name}: last 1 % of shards / run"] = row["last_percent_of_run"]
        result[f"{name}: driver's peak memory / 500 MiB"] = row["driver_peak_mib"] / 500
        result[f"{name}: scheduling / 60 s"] = row["scheduling_s"] / 60
    return {name: round(value, 4) for name, value in result.items()}


if __name__ == "__main__":
    main()
