"""How well do workers of the engine share the work? The same 20 shards on one worker, on two, and on plain processes.

    python -m benchmarks.overhead --out benchmarks/results/overhead.json

The shards are images of a folder, read, decoded and resized by the stages of `precompute`. The limit is two plain
processes that each do half of the shards with the same stages and nothing else: no scheduler, no Ray. The start is
left out: each run begins with 8 more shards that do not count. Kinds of runs take turns.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report

SHARDS, WARM_UP, ROWS, SIDE_PX = 20, 8, 48, 640
KINDS = [("ray", 1), ("ray", 2), ("local", 1), ("local", 2), ("plain", 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=4, metavar=("KIND", "WORKERS", "IMAGES", "RUN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, workers, images, run = args.one
        print(json.dumps(measure(kind, int(workers), Path(images), Path(run))))
        return
    seconds: dict[tuple[str, int], list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        draw(images)
        for _ in range(args.rounds):
            for kind, workers in KINDS:
                run = Path(folder) / "run"
                command = [sys.executable, "-m", "benchmarks.overhead", "--one", kind, str(workers)]
                done = subprocess.run([*command, str(images), str(run)], check=True, stdout=subprocess.PIPE)
                seconds[kind, workers].append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(run)
    rows = [
        {"executor": kind, "workers": workers, "seconds": statistics.median(found), "of rounds": len(found)}
        for (kind, workers), found in seconds.items()
    ]
    ratios = {
        "ray: 2 workers / 1 worker": ratio(seconds["ray", 1], seconds["ray", 2]),
        "local: 2 workers / 1 worker": ratio(seconds["local", 1], seconds["local", 2]),
        "ray, 2 workers / two plain processes": ratio(seconds["plain", 2], seconds["ray", 2]),
        "local, 2 workers / two plain processes": ratio(seconds["plain", 2], seconds["local", 2]),
    }
    notes = [
        f"seconds of {SHARDS} shards of {ROWS} images of {SIDE_PX} px, without the start; medians of {args.rounds} "
        "rounds; ratios of speeds, within a round",
        "what the engine had fetched ahead for these shards when they began is added to its time; what is left of its "
        "lead over plain processes is that it reads and writes some shards while it resizes others",
    ]
    report("overhead", rows, ratios, args.out, ["imagen-precompute", "ray", "pillow"], notes)


def ratio(slower: list[float], faster: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def draw(folder: Path) -> None:
    """Smooth random images, as costly to decode as photographs."""
    from PIL import Image

    random = np.random.default_rng(0)
    for shard in range(SHARDS + WARM_UP):
        (folder / f"{shard:05d}").mkdir(parents=True)
        for row in range(ROWS):
            path = folder / f"{shard:05d}" / f"{row:05d}.jpg"
            small = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8))
            small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(path, quality=92)
            path.with_suffix(".txt").write_text(f"image {row} of shard {shard}")


def measure(kind: str, workers: int, images: Path, run: Path) -> float:
    """Seconds for 20 shards by processes that have warmed up."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return plain(workers, images, run) if kind == "plain" else engine(kind, workers, images, run)


def workflow_of(images: Path, workers: int) -> Any:
    from pipeline.config import load_config
    from workflows.precompute import Precompute, PrecomputeConfig

    settings = [
        f"source={{kind: folder, path: {images}}}",
        f"shard_size={ROWS}",
        "images.sizes_px=[64,256]",
        "encoders=[]",
        f"execution.num_cpus={workers}",
    ]
    return Precompute(load_config(PrecomputeConfig, None, settings))


def engine(executor: str, workers: int, images: Path, run: Path) -> float:
    from pipeline.options import RunOptions

    workflow_of(images, workers).run(str(run), RunOptions(executor, quiet=True))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    done = [event for event in events if event["event"] == "task"]
    resized = [event for event in done if event["stage"] == "resize"]
    assert len(resized) == SHARDS + WARM_UP
    began = resized[WARM_UP - 1]["time"]
    later = {event["shard"] for event in resized[WARM_UP:]}
    ahead = sum(e["seconds"] for e in done if e["shard"] in later and e["stage"] == "fetch" and e["time"] <= began)
    return resized[-1]["time"] - began + ahead / workers


def plain(workers: int, images: Path, run: Path) -> float:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers + 1)
    processes = [context.Process(target=_do_part, args=(i, workers, images, run, ready)) for i in range(workers)]
    for process in processes:
        process.start()
    ready.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return time.perf_counter() - began


def _do_part(part: int, parts: int, images: Path, place: Path, ready: Barrier) -> None:
    from pipeline.executors.task import TaskRequest, run_task
    from pipeline.storage.run_folder import RunFolder

    run = RunFolder(place)
    plan = workflow_of(images, 1).plan(run)
    run.transient_groups = plan.transient_groups
    fingerprints = plan.digests
    shards = list(plan.shards())[part::parts]
    for number, shard in enumerate(shards):
        if number == WARM_UP // parts:
            ready.wait()
        present: set[str] = set()
        for stage in plan.stages:
            wanted = frozenset(group.name for group in stage.groups)
            mine = {name: fingerprints[name] for name in wanted}
            outcome = run_task(stage, run, TaskRequest(stage.name, shard, wanted, mine, frozenset(present)))
            assert outcome.error is None, outcome.error
            present |= wanted


if __name__ == "__main__":
    main()
