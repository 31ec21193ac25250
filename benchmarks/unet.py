"""How long is a training step, and how much memory does it take, against every peer that can be installed?

About 25M parameters each, 32 px, batch 4, 32 tokens, float32: loss, backward pass and optimizer step, with the text
embeddings as input. Each model has its own process; rounds are interleaved, so that a slow spell of the machine falls
on all. Ours are also measured at an earlier commit, in the same rounds, with its own code.

    python -m benchmarks.unet --peers-python peers/bin/python --out benchmarks/results/unet.json

`unet_peers.py` says how to make the peers' environment; without --peers-python only ours are measured. --threads 1 is
for a machine that others compute on: then the processor time says more than the wall clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import report
from benchmarks.earlier import ROOT, unpack
from benchmarks.unet_ours import MODELS, SIDE, WIDTH, loss_of
from benchmarks.unet_peers import PEERS
from imagen_core.diffusion import Denoiser, DenoiserConfig
from pipeline.executors.process import SHORT_SPIN

_TICKS = os.sysconf("SC_CLK_TCK")


class Contestant:
    """A model in a process that runs steps on request."""

    def __init__(
        self,
        name: str,
        python: str,
        module: str,
        *,
        checkout: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), **(environment or {})},
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        """Processor time of a step, mean of each round."""
        self.facts: dict[str, Any] = {}
        self._send(name)

    def run(self, steps: int, *, count: bool = True) -> None:
        """Runs steps and waits for them."""
        began = self._processor_time()
        self._send(str(steps))
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # peers print greetings
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended; run it by hand to see why")
        self.facts = json.loads(line)
        if count:
            self.seconds += self.facts["seconds"]
            self.cpu_seconds.append((self._processor_time() - began) / steps)

    def row(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "parameters_m": round(self.facts["parameters"] / 1e6, 2),
            "ms_per_step": round(1000 * statistics.median(self.seconds), 1),
            "cpu_ms_per_step": round(1000 * statistics.median(self.cpu_seconds), 1),
            "peak_gib": round(self.facts["peak_bytes"] / 2**30, 3),
        }

    def _processor_time(self) -> float:
        """Seconds of all threads so far, from /proc (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


def gflops(name: str) -> float:
    """Floating-point operations of one step of ours, in units of 10^9."""
    unet = {"image_size_px": SIDE, "text_dim": WIDTH, **MODELS[name]}
    denoiser = Denoiser(DenoiserConfig.model_validate({"unet": unet, "size_px": SIDE}))
    loss = loss_of(denoiser)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", help="python of an environment with the peers")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    parser.add_argument("--threads", type=int, help="threads of each process; by default torch's own number")
    parser.add_argument("--earlier", default="1ec2329", help="a commit; empty for none")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    threads = {} if arguments.threads is None else {"OMP_NUM_THREADS": str(arguments.threads)}

    with tempfile.TemporaryDirectory() as folder:
        ours = {"environment": {**SHORT_SPIN, **threads}}  # as `pipeline run train` sets them
        now = [Contestant(name, sys.executable, "benchmarks.unet_ours", **ours) for name in MODELS]
        then: list[Contestant] = []
        if arguments.earlier:
            checkout = Path(folder) / "earlier"
            unpack(arguments.earlier, checkout)
            then = [
                Contestant(name, sys.executable, "benchmarks.unet_ours", checkout=checkout, environment=threads)
                for name in MODELS
            ]
        peers: list[Contestant] = []
        if arguments.peers_python:
            peers = [
                Contestant(name, arguments.peers_python, "benchmarks.unet_peers", environment=threads)
                for name in PEERS
            ]
        contestants = [*now, *then, *peers]
        for contestant in contestants:
            contestant.run(2, count=False)
        for _ in range(arguments.rounds):
            for contestant in contestants:
                contestant.run(arguments.steps)
        for contestant in contestants:
            contestant.close()
    of_now, of_then, of_peers = ([contestant.row() for contestant in group] for group in (now, then, peers))
    for row in of_now:
        row["gflop_per_step"] = round(gflops(row["model"]), 1)
    for row in of_then:
        row["model"] += f", {arguments.earlier}"
    ratios = _ratios(of_now, of_then, of_peers)
    report(
        "unet",
        of_now + of_then + of_peers,
        ratios,
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            "ms_per_step: median of loss, backward pass and optimizer step; cpu_ms_per_step: processor time of all "
            "threads; peak_gib: largest resident memory of the process, packages included",
            "ours with the settings of `pipeline run train`, peers and earlier commit with PyTorch's defaults"
            + (f"; {arguments.threads} thread(s)" if arguments.threads else ""),
            "parameters are matched; layouts are each system's own, so the work a step (gflop) differs",
        ],
    )


def _ratios(now: list[dict[str, Any]], then: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over the fastest and the smallest peer, imagen-pytorch, and the earlier commit: wall clock, processor time
    and memory."""
    ratios: dict[str, float] = {}
    for name, column in (("step", "ms_per_step"), ("processor time", "cpu_ms_per_step"), ("memory", "peak_gib")):
        for row in now if peers else ():
            least = min(peers, key=lambda peer: peer[column])
            which = "smallest" if column == "peak_gib" else "fastest"
            ratios[f"{name}: {row['model']} / {which} peer ({least['model']})"] = row[column] / least[column]
        for row, earlier in zip(now, then, strict=False):
            ratios[f"{name}: {row['model']} / the same at the earlier commit"] = row[column] / earlier[column]
        if peers and column != "peak_gib":
            layout = next(peer for peer in peers if peer["model"] == "imagen-pytorch")
            ratios[f"{name}, the same layout: ours, Hybrid / imagen-pytorch"] = now[0][column] / layout[column]
    return ratios


if __name__ == "__main__":
    main()
