"""Does a run survive? Runs of precompute, each killed at random moments and started again until it ends.

Killed are the driver, a worker of any stage, and on Ray the raylet (and with it every process of the machine's Ray).
After each run every byte of the store is compared with that of an uninterrupted one.

python -m benchmarks.chaos --runs 30 --work FOLDER --out benchmarks/results/chaos.json
"""

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import report
from tests.processes import descendants

CONFIG = [
    "source.num_samples=240",
    "shard_size=12",
    "images.sizes_px=[32,64]",
    "execution={num_cpus: 2, retry_delay_s: 0.5}",
]
VICTIMS = {
    "ray": {"driver": "", "worker": "ray::StageActor", "raylet": "raylet/raylet"},
    "local": {"driver": "", "worker": "spawn_main|multiprocessing.forkserver"},
}
_MOST_KILLS = 3
_MOST_STARTS = 10


@dataclass
class Story:
    """What happened to one run."""

    executor: str
    starts: int = 0
    kills: list[str] = field(default_factory=list)
    lost_s: list[float] = field(default_factory=list)
    """Of each kill that ended the run: seconds since the last commit, or since its start."""
    seconds: float = 0.0
    """From the first start to the end, all starts of Ray and packages included."""
    identical: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    reference, reference_s = uninterrupted(arguments.work / "reference")
    stories = []
    for number in range(arguments.runs):
        chance = random.Random(f"{arguments.seed}/{number}")
        executor = "ray" if number % 3 == 0 else "local"
        story = survive(arguments.work / f"run-{number:03d}", executor, chance, reference, reference_s[executor])
        stories.append(story)
        write(stories, reference_s, arguments.out)  # after each run, so that finished runs count if this ends early
    if not all(story.identical for story in stories):
        sys.exit("a store differs from that of an uninterrupted run")


def uninterrupted(folder: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """The store's bytes, and the seconds that a run takes, by executor."""
    seconds, stores = {}, []
    for executor in VICTIMS:
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        assert start(folder, executor).wait() == 0
        seconds[executor] = time.perf_counter() - began
        stores.append(store_bytes(folder))
    assert stores[0] == stores[1], "the executors' stores differ"
    return stores[0], seconds


def survive(out: Path, executor: str, chance: random.Random, reference: dict[str, bytes], usual_s: float) -> Story:
    """Kills one to three times, each time somewhere within the usual length of a run, then lets the run end."""
    shutil.rmtree(out, ignore_errors=True)
    story = Story(executor)
    planned = chance.randint(1, _MOST_KILLS)
    began = time.perf_counter()
    while True:
        story.starts += 1
        assert story.starts <= _MOST_STARTS, f"{story}: does not come to an end"
        process, started = start(out, executor), time.time()
        while process.poll() is None and len(story.kills) < planned:
            _wait(process, chance.uniform(0.2, 0.8 * usual_s))
            family = descendants(process.pid)
            victim = _kill(process, VICTIMS[executor], family, chance)
            if victim is not None:
                story.kills.append(victim)
                if victim in ("driver", "raylet"):
                    story.lost_s.append(time.time() - max(started, _last_commit(out)))
                    break
        if process.wait() == 0 and story.kills:
            break
        if not story.kills:  # it ended before anything could be killed
            shutil.rmtree(out)
    story.seconds = time.perf_counter() - began
    found = store_bytes(out)
    half = [path for path in out.rglob("*") if path.name.startswith(".tmp-")]
    story.identical = found == reference and not half
    if story.identical:
        shutil.rmtree(out)
    return story


def start(out: Path, executor: str) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "run",
        "precompute",
        "--out",
        str(out),
        "--executor",
        executor,
    ]
    return subprocess.Popen(
        [*command, "--quiet", *CONFIG], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def store_bytes(out: Path) -> dict[str, bytes]:
    """Every file of the store, by name."""
    store = out / "store"
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def write(stories: list[Story], reference_s: dict[str, float], out: Path | None) -> None:
    kills = [victim for story in stories for victim in story.kills]
    lost = [seconds for story in stories for seconds in story.lost_s]
    rows: list[dict[str, Any]] = [
        {
            "run": number,
            "executor": story.executor,
            "kills": " ".join(story.kills),
            "starts": story.starts,
            "seconds": round(story.seconds, 1),
            "lost_s": " ".join(f"{seconds:.1f}" for seconds in story.lost_s),
            "identical": story.identical,
        }
        for number, story in enumerate(stories)
    ]
    by_victim = ", ".join(f"{victim} {kills.count(victim)}" for victim in dict.fromkeys(kills))
    report(
        "chaos",
        rows,
        {
            "runs with every byte as in an uninterrupted run / runs": sum(s.identical for s in stories) / len(stories),
            "kills / runs": len(kills) / len(stories),
            "seconds since the last commit at a kill of driver or raylet, mean": statistics.mean(lost)
            if lost
            else 0.0,
            **{
                f"time of a killed run / an uninterrupted one, {executor}": statistics.mean(
                    story.seconds / usual for story in stories if story.executor == executor
                )
                for executor, usual in reference_s.items()
                if any(story.executor == executor for story in stories)
            },
        },
        out,
        packages=["imagen-precompute", "ray"],
        notes=[
            f"{len(stories)} runs, {len(kills)} kills by SIGKILL: {by_victim}",
            f"20 shards of 12 images, downloaded over loopback; uninterrupted {reference_s['ray']:.0f} s on Ray, "
            f"{reference_s['local']:.0f} s on plain processes",
        ],
    )


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _kill(
    process: "subprocess.Popen[bytes]", victims: dict[str, str], family: dict[int, str], chance: random.Random
) -> str | None:
    """Kills one process of a kind that is running and returns the kind."""
    there = {
        kind: [pid for pid, line in family.items() if re.search(pattern, line)] if pattern else [process.pid]
        for kind, pattern in victims.items()
    }
    kind = chance.choice([kind for kind in victims if there[kind]])
    if process.poll() is not None:
        return None
    try:
        os.kill(chance.choice(sorted(there[kind])), signal.SIGKILL)
    except ProcessLookupError:
        return None
    return kind


def _last_commit(out: Path) -> float:
    """Unix time of the newest completion record, 0 if there is none."""
    return max((path.stat().st_mtime for path in (out / "state").glob("*/*.json")), default=0.0)


if __name__ == "__main__":
    main()
