"""Does training learn at all? Eight images, learned by heart: the loss to expect at each step.

If your own first training shows only noise, run this: it takes three minutes on two CPU cores, and your loss should
follow the curve in docs/overfit.svg.

    python -m benchmarks.overfit --work /tmp/overfit --out benchmarks/results/overfit.json --plot docs/overfit.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cascade import pipeline
from benchmarks.common import report
from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.diffusion import Guidance
from imagen_core.store import Store
from imagen_core.train import load_checkpoint

STEPS = 3000
OVERRIDES = (
    f"num_steps={STEPS}",
    "batch_size=32",
    "validation.num_samples=0",
    "conditioning_dropout.text=0.0",
    "logging.every_steps=100",
    "grid.every_steps=null",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the store and the checkpoints")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--plot", type=Path, help="SVG of the loss curve")
    arguments = parser.parse_args()
    work: Path = arguments.work
    pipeline(
        "run", "precompute", "-c", "demo", "--executor", "inline", "--out", str(work), "--quiet",
        "source.num_samples=8", "source.dead_links=0", "images.sizes_px=[16]",
    )  # fmt: skip
    seconds = pipeline(
        "run", "train", "-c", "demo-base", "--out", str(work / "base"), f"store={work}/store", *OVERRIDES
    )
    lines = (work / "base" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]
    rows: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in curve]
    errors = image_errors(work)
    report(
        "overfit",
        rows,
        {
            "loss at the end / at the start": curve[-1][1] / curve[0][1],
            "drawn image's mean error in grey levels": float(np.mean(errors)),
        },
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[f"8 images, the demo's base model, {STEPS} steps of 32, {seconds:.0f} s"],
    )
    if arguments.plot is not None:
        plot(curve, arguments.plot)


def image_errors(work: Path) -> list[float]:
    """Mean absolute error, in levels of 255, of the image generated from each caption."""
    store, loaded = Store.open(work / "store"), load_checkpoint(work / "base")
    sampling = SamplingConfig(num_steps=25, guidance=Guidance(text=1.0))
    cascade = Cascade([CascadeStage(loaded.denoiser, sampling)], loaded.encoder)
    samples = [store[index] for index in range(len(store))]
    drawn = cascade.sample([sample.text["t5"][0] for sample in samples], list(range(len(samples))))[16]
    pixels = ((drawn + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).to(torch.float64).numpy()
    return [float(np.abs(p - s.images[16]).mean()) for p, s in zip(pixels, samples, strict=True)]


def plot(curve: list[tuple[int, float]], path: Path) -> None:
    """Loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.semilogy([step for step, _ in curve], [loss for _, loss in curve])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title("8 images learned by heart: the loss to expect", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
