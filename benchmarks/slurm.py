"""Does a run survive what Slurm does to jobs? On a real Slurm with two nodes, on this machine's loopback interface.

The jobs are those that `pipeline schedule --kind slurm` writes, submitted with the command that it prints. After each
scene every byte of the store is compared with that of an uninterrupted local run.

python -m benchmarks.slurm --out benchmarks/results/slurm.json
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import report
from tests.runs import pipeline, store_bytes
from tests.slurm_cluster import Slurm, slurm, slurm_missing

SETTINGS = ["shard_size=8", "images.sizes_px=[64]", "encoders=[]", "source.download.max_per_host=1"]
PACE = ["source.download.min_interval_s=0.5", "execution.grace_s=1"]  # so a shard takes 4 s, most of them asleep
PARTS = 3
_LIMIT_S = 900.0


@dataclass
class Story:
    """What happened to one run."""

    scene: str
    jobs: int
    starts: int
    """How often the run was started, in all jobs."""
    requeued: int
    """How often Slurm put a job back into its queue."""
    ends: str
    """How the starts ended, as the run tells it; one that was killed tells nothing."""
    shards_again: int
    """Shards whose images had been fetched, and were fetched again."""
    seconds: float
    identical: bool


class Scene:
    """One run in a folder of its own."""

    def __init__(self, cluster: Slurm, name: str, work: Path, num_shards: int):
        self.cluster, self.name, self.num_shards = cluster, name, num_shards
        self.folder = work / name
        self.out = self.folder / "run"
        self.jobs: list[str] = []

    def submit(self, *options: str, executor: str | None = "inline") -> str:
        """Schedules the run and submits its jobs; returns the first one."""
        self.folder.mkdir()
        settings = [*SETTINGS, *PACE, f"source.num_samples={8 * self.num_shards}"]
        words = ["precompute", "--out", str(self.out), "--cpus", "1", *options, *settings]
        words += [] if executor is None else ["--executor", executor]
        self.jobs = self.cluster.submit(words, self.folder)
        return self.jobs[0]

    def wait_for_shards(self, count: int) -> None:
        """Waits until so many shards are committed."""
        done = lambda: len(list((self.out / "state" / "samples").glob("*.json"))) >= count  # noqa: E731
        self.cluster.wait(f"{count} shards", done, _LIMIT_S)

    def finish(self) -> None:
        """Waits for the end of the last job; all must have succeeded."""
        last = self.cluster.wait_for_end(self.jobs[-1], _LIMIT_S)
        assert (last["JobState"], last["ExitCode"]) == ("COMPLETED", "0:0"), last

    def events(self) -> list[dict[str, object]]:
        files = sorted(self.out.rglob("events*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def story(self, seconds: float, reference: Mapping[str, bytes]) -> Story:
        events = self.events()
        fetched = Counter(event["shard"] for event in events if event.get("stage") == "fetch" and "shard" in event)
        ends = Counter(str(event["outcome"]) for event in events if event["event"] == "run_ended")
        tasks = [facts for job in self.jobs for facts in self.cluster.all_facts(job)]
        return Story(
            self.name,
            jobs=len(tasks),
            starts=sum(event["event"] == "run_started" for event in events),
            requeued=sum(int(facts["Restarts"]) for facts in tasks),
            ends=", ".join(f"{end} {count}" for end, count in sorted(ends.items())),
            shards_again=sum(count - 1 for count in fetched.values()),
            seconds=round(seconds, 1),
            identical=store_bytes(self.out) == dict(reference),
        )


def undisturbed(scene: Scene) -> None:
    scene.submit()
    scene.finish()


def preempted(scene: Scene) -> None:
    """Put back into the queue, as Slurm does for a job of more weight."""
    job = scene.submit()
    scene.wait_for_shards(2)
    scene.cluster.call("scontrol", "requeue", job)
    scene.finish()


def node_lost(scene: Scene) -> None:
    """The node of the job ends at once, with all its processes; the other node takes the job."""
    job = scene.submit()
    scene.wait_for_shards(2)
    lost = scene.cluster.facts(job)["NodeList"]
    scene.cluster.end_node(lost)
    scene.finish()
    assert scene.cluster.facts(job)["NodeList"] != lost
    scene.cluster.start_node(lost)
    scene.cluster.wait_for_nodes()


def time_limit(scene: Scene) -> None:
    """The job may take a minute, and is told 30 s before it is over, or earlier."""
    scene.submit("--time", "1")
    scene.finish()


def array(scene: Scene) -> None:
    """Parts as the tasks of an array, one of them put back into the queue; then the job that finishes the run."""
    job = scene.submit("--array", str(PARTS))
    scene.wait_for_shards(2)
    scene.cluster.call("scontrol", "requeue", f"{job}_{PARTS}")
    scene.finish()


def cancelled(scene: Scene) -> None:
    """Cancelled by its user, which holds; the same script, submitted again, goes on."""
    job = scene.submit()
    scene.wait_for_shards(2)
    scene.cluster.call("scancel", job)
    scene.cluster.wait("the end of the job", lambda: not scene.cluster.states(), _LIMIT_S)
    assert scene.cluster.facts(job)["JobState"] == "CANCELLED"
    (script,) = scene.folder.glob("*.sh")
    scene.jobs.append(scene.cluster.call("sbatch", "--parsable", str(script), cwd=scene.folder))
    scene.finish()


def two_nodes(scene: Scene) -> None:
    """Ray over both nodes; the job is put back into the queue."""
    job = scene.submit("--nodes", "2", executor=None)
    scene.wait_for_shards(2)
    scene.cluster.call("scontrol", "requeue", job)
    scene.finish()


def in_containers(scene: Scene) -> None:
    """In a step of `srun` as with Pyxis, whose options a stand-in leaves out; ended by the time limit."""
    scene.submit("--container-image", "registry#pipeline:1", "--time", "1")
    scene.finish()
    noted = (scene.cluster.folder / "bin" / "containers").read_text().splitlines()
    assert "--container-image=registry#pipeline:1" in noted
    assert any(word.startswith(f"--container-mounts={scene.out}:{scene.out}") for word in noted), noted


SCENES: dict[str, Callable[[Scene], None]] = {
    scene.__name__: scene
    for scene in (undisturbed, preempted, node_lost, time_limit, array, cancelled, two_nodes, in_containers)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", action="append", choices=SCENES, help="only this one; may be repeated")
    parser.add_argument("--shards", type=int, default=10, help="of each run; at least 4")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if missing := slurm_missing():
        print(f"skipped: {missing}")
        return
    work = Path(tempfile.mkdtemp(prefix="slurm-evidence-"))
    stories: list[Story] = []
    try:
        run = ("run", "precompute", "--executor", "inline", "--quiet", "--out", str(work / "reference"))
        pipeline(*run, *SETTINGS, f"source.num_samples={8 * arguments.shards}", timeout_s=_LIMIT_S)
        reference = store_bytes(work / "reference")
        with slurm() as cluster:
            version = cluster.version()
            for name in arguments.scene or SCENES:
                scene, began = Scene(cluster, name, work, arguments.shards), time.perf_counter()
                SCENES[name](scene)
                stories.append(scene.story(time.perf_counter() - began, reference))
                print(stories[-1], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    notes = [
        f"Slurm {version}: slurmctld, munge and two slurmd on loopback; {arguments.shards} shards of 8 images, "
        "paced at 2 per s",
        f"{sum(story.starts for story in stories)} starts, {sum(story.requeued for story in stories)} times a job was "
        f"put back into the queue, {sum(not story.identical for story in stories)} stores differ",
    ]
    report("slurm", [asdict(story) for story in stories], {}, arguments.out, ["imagen-precompute", "ray"], notes)
    if not all(story.identical for story in stories):
        sys.exit("a store differs from that of an uninterrupted run")


if __name__ == "__main__":
    main()
