"""How long does sampling take, and how much memory, against the peers that can be installed, and an earlier commit?

25 steps with guidance 3, random weights, 23 to 26M parameters (super-resolution 64 -> 256 px: about 20M), captions of
32 tokens as embeddings, float32: processor time of one thread, and wall clock of two. Each model has its own process,
and rounds are interleaved, so that a slow spell of the machine falls on all. Ours have the layouts of diffusers' IF
and of imagen-pytorch, with their numbers of parameters.

    python -m benchmarks.sampling --earlier 1ec2329 --peers-python peers/bin/python \
        --out benchmarks/results/sampling.json

`unet_peers.py` says how to make the peers' environment; without --peers-python only ours are measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.earlier import ROOT, unpack
from benchmarks.sampling_ours import HYBRID, IF, MODELS
from benchmarks.sampling_peers import LOW_RES, PEERS

CASES = {
    "32 px, batch 4": (32, 4),
    "64 px, batch 4": (64, 4),
    "32 px, batch 16": (32, 16),
    "64 -> 256 px, batch 1": (256, 1),
}
COMPARED = ((IF, "diffusers, IF layout"), (HYBRID, "imagen-pytorch"), (HYBRID, "DALLE2-pytorch decoder"))
"""Ours, and the peer over ours."""
THREADS = {"processor": 1, "wall": 2}
"""What is measured, with how many threads."""


class Contestant:
    """A model in a process that samples on request."""

    def __init__(self, label: str, command: list[str], folder: Path, case: dict[str, Any]):
        self.label, self.seconds, self.facts = label, list[float](), dict[str, Any]()
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(case["threads"])}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder,
            env=environment,
        )  # fmt: skip
        self._send(json.dumps(case))

    def run(self, measured: str | None) -> None:
        """Samples once, and keeps the seconds of this clock."""
        self._send("1")
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):  # peers print greetings
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.label}: its process ended; run it by hand to see why")
        self.facts = json.loads(line)
        if measured is not None:
            self.seconds += self.facts[measured]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def contestants(arguments: argparse.Namespace, earlier: Path | None, case: dict[str, Any]) -> list[Contestant]:
    """Processes of ours, ours of the earlier commit, and the peers."""
    ours = [sys.executable, "-m", "benchmarks.sampling_ours"]
    found = [Contestant(name, ours, ROOT, case | {"name": name}) for name in MODELS]
    if earlier is not None:
        found += [Contestant(f"{name}, {arguments.earlier}", ours, earlier, case | {"name": name}) for name in MODELS]
    if arguments.peers_python:
        command = [arguments.peers_python, str(ROOT / "benchmarks" / "sampling_peers.py")]
        names = [name for name in PEERS if case["side"] <= LOW_RES or not name.startswith("DALLE2")]
        found += [Contestant(name, command, ROOT, case | {"name": name}) for name in names]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers-python", help="python of an environment with the peers")
    parser.add_argument("--earlier", help="an earlier commit, measured too")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measured", nargs="+", choices=THREADS, default=list(THREADS))
    parser.add_argument("--rounds", type=int, default=4, help="samplings of each model, after one that is not counted")
    parser.add_argument("--steps", type=int, default=25, help="noise levels of a sampling")
    parser.add_argument("--out", type=Path, help="JSON report")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        earlier = None
        if arguments.earlier:
            earlier = Path(folder) / "earlier"
            unpack(arguments.earlier, earlier)
            for name in ("sampling_ours.py", "sampling_peers.py"):
                shutil.copy(ROOT / "benchmarks" / name, earlier / "benchmarks" / name)
        for name in arguments.cases:
            for measured in arguments.measured:
                side, batch = CASES[name]
                case = {"side": side, "batch": batch, "steps": arguments.steps, "threads": THREADS[measured]}
                found = contestants(arguments, earlier, case)
                for round_number in range(arguments.rounds + 1):
                    for contestant in found:
                        contestant.run(measured if round_number else None)
                for contestant in found:
                    contestant.close()
                these = {each.label: row(each, name, measured) for each in found}
                rows += these.values()
                ratios |= compared(these, f"{name}, {measured}", arguments.earlier)
    report("sampling", rows, ratios, arguments.out, ["imagen-precompute", "torch"], notes(arguments))


def row(contestant: Contestant, case: str, measured: str) -> dict[str, Any]:
    """The least seconds of a contestant, and its memory."""
    return {
        "case": case,
        "model": contestant.label,
        "clock": f"{measured}, threads: {THREADS[measured]}",
        "seconds": round(min(contestant.seconds), 3),
        "parameters_m": round(contestant.facts["parameters"] / 1e6, 2),
        "peak_gib": round(contestant.facts["peak_bytes"] / 2**30, 3),
    }


def compared(rows: dict[str, dict[str, Any]], case: str, earlier: str | None) -> dict[str, float]:
    """Seconds of peers and of the earlier commit over ours, and memory of ours over theirs."""
    ratios: dict[str, float] = {}
    pairs = [*COMPARED, *((name, f"{name}, {earlier}") for name in MODELS)]
    for ours, other in pairs:
        if other in rows:
            short = f"{case}: {ours}, {{}} {other.removeprefix(f'{ours}, ')}"
            ratios[short.format("times faster than")] = rows[other]["seconds"] / rows[ours]["seconds"]
            ratios[short.format("memory over that of")] = rows[ours]["peak_gib"] / rows[other]["peak_gib"]
    return ratios


def notes(arguments: argparse.Namespace) -> list[str]:
    return [
        f"{arguments.steps} steps, guidance 3: each step is one evaluation for the conditional and the unconditional "
        "images together; ours DPM-Solver++ 2M, as diffusers; imagen-pytorch DDPM, DALLE2-pytorch DDIM",
        f"seconds: the least of {arguments.rounds} samplings, in turns; peak_gib: largest resident memory of the "
        "process, packages included",
        *(["the earlier commit lacks options of IF's layout, which are left out there"] if arguments.earlier else []),
    ]


if __name__ == "__main__":
    main()
