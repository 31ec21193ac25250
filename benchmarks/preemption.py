"""Does a run survive a cluster whose nodes come and go, the death of its driver, and that of its head?

A cluster of Ray nodes on this machine, on the loopback interface. Images come from a server that takes its time, so
that two cores are enough for four nodes. Nodes are killed and added at random, as are the driver and the head, which
are started again. Afterwards every byte of the store is compared with that of a run that nothing befell, and what was
done again is compared with what was under way when something was killed.

python -m benchmarks.preemption --work FOLDER --out benchmarks/results/preemption.json
"""

import argparse
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.preemption_cluster import Clusters
from benchmarks.preemption_run import Driver, Images, config_of, lost_work, store_bytes, uninterrupted
from pipeline.errors import EXIT_PREEMPTED
from tests.network import forbid_outside_access

_DELAY_S = 3.0  # of an image; so long that a run of 2,000 takes about as long as 63 kills
_END_S = 1200.0  # until a run ends that nothing befalls any more
_HEAD_S = 240.0  # until a driver ends whose head is lost
_NONE = ("different_files", "set_aside", "half_written", "finished_again", "unexplained_again")
_PATIENCE_S = 600.0  # until enough nodes are up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--kills", type=int, default=50, help="nodes killed; each is followed by a new one")
    parser.add_argument("--drivers", type=int, default=10, help="how often the driver is killed")
    parser.add_argument("--heads", type=int, default=3, help="how often the head is killed")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--every-s", type=float, default=6.0, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speedup-images", type=int, default=2000, help="0: no comparison of 1 node with 4")
    parser.add_argument("--speedup-delay-s", type=float, default=1.2, help="seconds of an image in it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    forbid_outside_access()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    results, ratios = [], {}
    if arguments.images:
        results.append(kills(arguments))
    if arguments.speedup_images:
        rows, ratios = speedup(arguments)
        results += rows
    report(
        "preemption" if arguments.images else "preemption_nodes",
        results,
        ratios,
        arguments.out,
        packages=["imagen-precompute", "ray"],
        notes=[
            "kills: SIGKILL to all processes of a node of Ray, to the driver, or to all processes of the head; a new "
            "node, driver or cluster follows. Everything is on one machine, on the loopback interface",
            "images come from a server that answers after delay_s, so that tasks wait rather than compute",
            "requests_again: images fetched more than once; allowed_again: those of shards whose fetch was under way "
            "when their node, or the driver, was killed",
        ],
    )
    bad = [f"{name} {row[name]}" for row in results for name in _NONE if row.get(name)]
    if bad:
        sys.exit(f"there should be none: {', '.join(bad)}")


def kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills as often as asked while runs go on; a run that ends before is compared, and the next one begins."""
    chance = random.Random(arguments.seed)
    actions = ["node"] * arguments.kills + ["driver"] * arguments.drivers + ["head"] * arguments.heads
    chance.shuffle(actions)
    work: Path = arguments.work
    with Images(work, arguments.images, delay_s=0.0) as images:
        config = config_of(work, images, shard_size=4, workers=2)
        reference = uninterrupted(work / "reference", config)
        images.delay_s = _DELAY_S
        images.forget()
        began = time.monotonic()
        with Clusters(work / "clusters", arguments.nodes, chance) as clusters:
            story = _Story(work, config, images, clusters, reference)
            try:
                for action in actions:
                    story.pass_time(chance.uniform(0.1, 2 * arguments.every_s - 0.1))
                    story.act(action)
                story.finish()
            finally:
                story.driver.end()
        return {
            "what": "kills",
            "nodes": arguments.nodes,
            "images": arguments.images,
            "shards": -(-arguments.images // 4),
            "delay_s": _DELAY_S,
            **{f"killed_{kind}": actions.count(kind) for kind in ("node", "driver", "head")},
            "nodes_added": clusters.added,
            "seconds": round(time.monotonic() - began, 1),
            **story.found,
        }


class _Story:
    """Runs, one after the other, and what befalls them."""

    def __init__(self, work: Path, config: Path, images: Images, clusters: Clusters, reference: dict[str, bytes]):
        self.work, self.config, self.images, self.clusters = work, config, images, clusters
        self.reference = reference
        self.found: dict[str, Any] = {"runs": 0, "starts": 0, "exit_75": 0}
        self.ends: list[float] = []
        """Unix times at which the driver of this run ended before the run was done."""
        self._begin_run()

    def _begin_run(self) -> None:
        self.found["runs"] += 1
        self.run = self.work / f"run-{self.found['runs']}"
        self.ends.clear()
        self.images.forget()
        self._start()

    def _start(self) -> None:
        self.found["starts"] += 1
        nodes = self.clusters.nodes
        self.driver = Driver(self.run, self.config, nodes.address, nodes.environment)

    def pass_time(self, seconds: float) -> None:
        """Waits, and until most nodes are up; a run that ends in it is compared."""
        end, patience = time.monotonic() + seconds, time.monotonic() + _PATIENCE_S
        while time.monotonic() < end or len(self.clusters.up) < max(1, self.clusters.wanted - 2):
            assert time.monotonic() < patience, f"only {self.clusters.up} are up"
            code = self.driver.poll()
            if code is not None:
                assert code == 0, f"the driver ended with {code}: {self.driver.said()}"
                self._compare()
                self._begin_run()
            time.sleep(0.1)

    def act(self, action: str) -> None:
        """Kills a node, the driver or the head; every second head is back at its address before the driver ends."""
        print(f"{time.strftime('%X')} {action}: {self.driver.finished()} tasks done, {sorted(self.clusters.up)} up")
        if action == "node":
            self.clusters.kill_one()
        elif action == "driver":
            self.driver.end()
            self.ends.append(time.time())
            self._start()
        else:
            began = time.monotonic()
            self.clusters.kill_head()
            if is_back := self.found["exit_75"] % 2 == 1:
                self.clusters.start()
            code = self.driver.wait(_HEAD_S)
            assert code == EXIT_PREEMPTED, f"without its head the driver ended with {code}: {self.driver.said()}"
            self.found["exit_75"] += 1
            self.found["longest_end_s"] = max(self.found.get("longest_end_s", 0.0), round(time.monotonic() - began, 1))
            self.ends.append(time.time())
            if not is_back:
                self.clusters.start()
            self._start()

    def finish(self) -> None:
        code = self.driver.wait(_END_S)
        assert code == 0, f"the driver ended with {code}: {self.driver.said()}"
        self._compare()

    def _compare(self) -> None:
        stored = store_bytes(self.run)
        names = self.reference.keys() | stored.keys()
        values = {
            "compared_files": len(names),
            "different_files": sum(self.reference.get(name) != stored.get(name) for name in names),
            **lost_work(self.run, self.images, self.ends),
        }
        for name, value in values.items():
            self.found[name] = self.found.get(name, 0) + value


def speedup(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The same run on one node and on several, one after the other."""
    rows, stores = [], []
    work: Path = arguments.work
    with Images(work, arguments.speedup_images, delay_s=arguments.speedup_delay_s) as images:
        config = config_of(work, images, shard_size=25, workers=1, max_in_flight_shards=64)
        for nodes in (1, arguments.nodes):
            with Clusters(work / f"clusters-{nodes}", nodes, random.Random(0)) as clusters:
                run = work / f"on-{nodes}"
                began = time.monotonic()
                driver = Driver(run, config, clusters.nodes.address, clusters.nodes.environment)
                try:
                    code = driver.wait(3600.0)
                finally:
                    driver.end()
                assert code == 0, driver.said()
                seconds = time.monotonic() - began
                stores.append(store_bytes(run))
            rows.append(
                {
                    "what": "whole run",
                    "nodes": nodes,
                    "images": arguments.speedup_images,
                    "shards": -(-arguments.speedup_images // 25),
                    "delay_s": images.delay_s,
                    "seconds": round(seconds, 1),
                    "different_files": sum(stores[0][name] != stores[-1].get(name) for name in stores[0]),
                }
            )
    return rows, {f"whole run: 1 node / {arguments.nodes} nodes": rows[0]["seconds"] / rows[1]["seconds"]}


if __name__ == "__main__":
    main()
