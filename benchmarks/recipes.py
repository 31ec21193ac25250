"""Which recipe learns most from the demo's scenes with the same work, and in the same time?

Each recipe trains a 16 px base on the demo's store twice for each seed: to an equal number of floating-point
operations (of the networks' steps, counted by torch), and to an equal processor time (measured over some steps of its
own). Then it generates images for captions held out of training, whose object's colour, shape and position are read
from the pixels as in `benchmarks.cascade`; with the exponential average of the weights, and with averages that are
rebuilt after training. Every step is a `pipeline` command with one thread.

    pipeline run precompute -c demo --out demo-run
    python -m benchmarks.recipes --store demo-run/store --work /tmp/recipes --out benchmarks/results/recipes.json
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cascade import PARTS, held_out_scenes, last_metrics, score
from benchmarks.common import report
from imagen_core.diffusion import Denoiser, DenoiserConfig, diffusion_loss
from imagen_core.models import Conditioning
from stages.images import read_image

SIDE, TOKENS, WIDTH = 16, 12, 64
ONE = {"OMP_NUM_THREADS": "1"}
EMA = "ema-0.99"
LENGTHS = (0.07, 0.15)
"""Relative lengths of the averages that are rebuilt."""

_EDM = {"schedule": {"kind": "log_normal", "mean": 0.2, "std": 1.1}, "objective": "edm"}
_FLOW = {"schedule": {"kind": "flow", "mean": 0.2, "std": 1.1}, "objective": "velocity"}
_JIT = _FLOW | {"objective": "x0", "loss_space": "velocity", "velocity_min_t": 0.05}
_UNET = {
    "family": "efficient",
    "image_size_px": SIDE,
    "embed_dim": 32,
    "channel_mult": [2, 4],
    "num_res_blocks": [1, 1],
    "attention_levels": [True, True],
    "head_dim": 32,
    "text_dim": WIDTH,
    "low_res": False,
}
_OLD_UNET = _UNET | {"channel_mult": [3, 3], "num_res_blocks": [1, 2]}
_TRANSFORMER = {
    "family": "transformer",
    "image_size_px": SIDE,
    "patch_px": 2,
    "bottleneck_dim": None,
    "dim": 128,
    "depth": 6,
    "num_heads": 4,
    "text_dim": WIDTH,
}
_ADAMW = {"kind": "adamw", "lr": 0.003, "betas": [0.9, 0.99], "warmup_steps": 50}
_ADAMW |= {"schedule": "cosine", "final_lr_fraction": 0.02}
_MUON = _ADAMW | {"kind": "muon", "muon": {"kernels": True}}

RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "UNet 3-3, EDM, AdamW (the demo at 1ec2329)": (_OLD_UNET, _EDM, _ADAMW),
    "UNet 2-4, EDM, AdamW": (_UNET, _EDM, _ADAMW),
    "UNet 2-4, EDM, Muon": (_UNET, _EDM, _MUON),
    "UNet 2-4, flow, velocity, Muon": (_UNET, _FLOW, _MUON),
    "UNet 2-4, flow, x0 with the velocity's loss, Muon": (_UNET, _JIT, _MUON),
    "transformer, flow, x0 with the velocity's loss, Muon": (_TRANSFORMER, _JIT, _ADAMW | {"kind": "muon"}),
}
"""Of each recipe the network, the diffusion and the optimizer."""


def command(*arguments: str) -> float:
    """Runs a `pipeline` command; the seconds of processor time it took."""
    print("$ pipeline " + " ".join(arguments), flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "pipeline", *arguments], check=True, env={**os.environ, **ONE})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Trial:
    """One recipe in a folder."""

    def __init__(self, name: str, store: str, folder: Path):
        self.name, self.folder = name, folder
        unet, diffusion, optimizer = RECIPES[name]
        self.settings: dict[str, Any] = {
            "store": store,
            "denoiser": {"size_px": SIDE, "unet": unet, "diffusion": diffusion},
            "text": "t5",
            "max_tokens": 32,
            "batch_size": 32,
            "optimizer": optimizer,
            "validation": {"num_samples": 0},
            "logging": {"every_steps": 20},
        }

    def train(self, out: Path, steps: int, seed: int) -> float:
        """Trains from the beginning; the seconds of processor time it took."""
        ema = {"rates": [float(EMA.removeprefix("ema-"))], "profiles": [0.05, 0.1]}
        settings = self.settings | {
            "num_steps": steps,
            "seed": seed,
            "ema": ema | {"snapshot_every_steps": max(1, steps // 20)},
            "checkpoints": {"every_steps": steps, "keep": 1},
        }
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        file = out.parent / f"{out.name}.yaml"
        file.write_text(json.dumps(settings), encoding="utf-8")
        return command("run", "train", "-c", str(file), "--out", str(out), "--quiet")

    def seconds_per_step(self, steps: int) -> float:
        """Processor time of a step, without what a training takes to start."""
        short, long = (self.train(self.folder / "pilot", count, 0) for count in (20, 20 + steps))
        return (long - short) / steps

    def flops_per_step(self) -> int:
        """Floating-point operations of the network in a step, forward and backward."""
        denoiser, count = Denoiser(DenoiserConfig.model_validate(self.settings["denoiser"])), 32
        images = torch.rand(count, 3, SIDE, SIDE)
        conditioning = Conditioning(
            text=torch.randn(count, TOKENS, WIDTH),
            text_mask=torch.ones(count, TOKENS, dtype=torch.bool),
            text_keep=torch.ones(count, dtype=torch.bool),
        )
        with FlopCounterMode(display=False) as counter:
            sigma = torch.full((count,), 0.5)
            diffusion_loss(denoiser, images, sigma, torch.randn_like(images), conditioning).mean().backward()
        return counter.get_total_flops()


def scores(run: Path, weights: str, captions: int) -> dict[str, float]:
    """What images of held-out captions show of them, 0..1, with these weights of a training."""
    scenes = held_out_scenes(captions)
    prompts, images = run.parent / "prompts.txt", run.parent / "images"
    prompts.write_text("\n".join(scene.captions[0] for scene in scenes) + "\n", encoding="utf-8")
    shutil.rmtree(images, ignore_errors=True)
    stage = {
        "checkpoint": str(run),
        "weights": weights,
        "sampling": {"num_steps": 25, "guidance": {"text": 3.0}},
    }
    file = run.parent / "sample.yaml"
    file.write_text(json.dumps({"stages": [stage], "prompts_file": str(prompts), "batch_size": 60}), encoding="utf-8")
    command("run", "sample", "-c", str(file), "--out", str(images), "--quiet")
    folder = images / f"images-{SIDE}"
    return score([read_image(folder / f"{index:05d}.png") for index in range(captions)], scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", required=True, help="the demo's store")
    parser.add_argument("--work", type=Path, required=True, help="folder for trainings and images")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--seconds", type=float, default=150, help="processor time of a training, in seconds")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--captions", type=int, default=240, help="number of held-out captions")
    parser.add_argument("--pilot-steps", type=int, default=60, help="steps over which a step is timed")
    arguments = parser.parse_args()

    trials = [Trial(name, arguments.store, arguments.work / f"recipe-{n}") for n, name in enumerate(RECIPES)]
    facts = {trial.name: (trial.seconds_per_step(arguments.pilot_steps), trial.flops_per_step()) for trial in trials}
    first_seconds, first_flops = facts[trials[0].name]
    total_flops = first_flops * arguments.seconds / first_seconds
    rows: list[dict[str, Any]] = []
    for trial in trials:
        seconds, flops = facts[trial.name]
        for equal, steps in (("time", arguments.seconds / seconds), ("operations", total_flops / flops)):
            found: dict[str, list[dict[str, float]]] = {}
            for seed in range(arguments.seeds):
                run = trial.folder / equal / "run"
                trial.train(run, round(steps), seed)
                for weights in (EMA, *(f"power-{length}" for length in LENGTHS)):
                    measured = scores(run, weights, arguments.captions)
                    found.setdefault(weights, []).append({"loss": last_metrics(run)["loss"], **measured})
            rows += [
                {
                    "recipe": trial.name,
                    "equal": equal,
                    "weights": weights,
                    "seeds": arguments.seeds,
                    "steps": round(steps),
                    "gflop_per_step": round(flops / 1e9, 2),
                    "ms_per_step": round(1000 * seconds, 1),
                    **{part: float(np.mean([one[part] for one in each])) for part in PARTS},
                    "shape_by_seed": [round(one["shape"], 3) for one in each],
                }
                for weights, each in found.items()
            ]
            print(json.dumps(rows[-1]), flush=True)

    def shape(recipe: str, equal: str) -> float:
        return max(row["shape"] for row in rows if row["recipe"] == recipe and row["equal"] == equal)

    demo = trials[0].name
    report(
        "recipes",
        rows,
        {
            f"shapes, equal {equal}: {trial.name} / {demo}": shape(trial.name, equal) / max(shape(demo, equal), 1e-9)
            for trial in trials[1:]
            for equal in ("time", "operations")
        },
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            f"16 px bases on the demo's store, batches of 32, one thread; {arguments.captions} held-out captions, 25 "
            "steps, guidance 3",
            f"time: {arguments.seconds:g} s of processor time; operations: as many as the first recipe has in it",
            "color, shape, position: part of the images whose object has the one the caption names, mean over seeds",
        ],
    )


if __name__ == "__main__":
    main()
