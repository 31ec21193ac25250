"""How long is a training step, and how much memory does it take, against every peer that can be installed?

About 25M parameters each, 32 px, batch 4, 32 tokens, float32: loss, backward pass and optimizer step, with the text
embeddings as input. Each model has its own process; rounds are interleaved, so that a slow spell of the machine falls
on all.

    python -m benchmarks.unet --peers-python peers/bin/python --out benchmarks/results/unet.json

`unet_peers.py` says how to make the peers' environment; without --peers-python only ours are measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import report
from benchmarks.unet_ours import MODELS, SIDE, WIDTH, loss_of
from benchmarks.unet_peers import PEERS
from imagen_core.diffusion import Denoiser, DenoiserConfig

ROOT = Path(__file__).resolve().parents[1]


class Contestant:
    """A model in a process that runs steps on request."""

    def __init__(self, name: str, python: str, script: str):
        self.name = name
        command = [python, script] if script.endswith(".py") else [python, "-m", script]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        self.seconds: list[float] = []
        self.facts: dict[str, Any] = {}
        self._send(name)

    def run(self, steps: int, *, count: bool = True) -> None:
        """Runs steps and waits for them."""
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
    arguments = parser.parse_args()
    torch.manual_seed(0)

    contestants = [Contestant(name, sys.executable, "benchmarks.unet_ours") for name in MODELS]
    if arguments.peers_python:
        script = str(ROOT / "benchmarks" / "unet_peers.py")
        contestants += [Contestant(name, arguments.peers_python, script) for name in PEERS]
    for contestant in contestants:
        contestant.run(2, count=False)
    for _ in range(arguments.rounds):
        for contestant in contestants:
            contestant.run(arguments.steps)
    rows: list[dict[str, Any]] = []
    for contestant in contestants:
        contestant.close()
        rows.append(
            {
                "model": contestant.name,
                "parameters_m": round(contestant.facts["parameters"] / 1e6, 2),
                "ms_per_step": round(1000 * statistics.median(contestant.seconds), 1),
                "peak_gib": round(contestant.facts["peak_bytes"] / 2**30, 3),
                "gflop_per_step": round(gflops(contestant.name), 1) if contestant.name in MODELS else "",
            }
        )
    ratios: dict[str, float] = {}
    peers = rows[len(MODELS) :]
    if peers:
        fastest = min(peers, key=lambda row: row["ms_per_step"])
        smallest = min(peers, key=lambda row: row["peak_gib"])
        for row in rows[: len(MODELS)]:
            ratios[f"step: {row['model']} / fastest peer ({fastest['model']})"] = (
                row["ms_per_step"] / fastest["ms_per_step"]
            )
            ratios[f"memory: {row['model']} / smallest peer ({smallest['model']})"] = (
                row["peak_gib"] / smallest["peak_gib"]
            )
        layout = next(row for row in peers if row["model"] == "imagen-pytorch")
        ratios["step, the same layout: ours, Hybrid / imagen-pytorch"] = rows[0]["ms_per_step"] / layout["ms_per_step"]
    report(
        "unet",
        rows,
        ratios,
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            "ms_per_step: median of loss, backward pass and optimizer step; peak_gib: largest resident memory of the "
            "process, packages included",
            "parameters are matched; layouts are each system's own, so the work a step (gflop) differs",
        ],
    )


if __name__ == "__main__":
    main()
