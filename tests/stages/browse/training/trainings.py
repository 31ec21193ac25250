"""Folders as trainings and samplings leave them, made by hand."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from imagen_core.images import write_png
from imagen_core.sealed import write_sealed


def lines(steps: Iterable[int], **metrics: float) -> str:
    """Lines of metrics; a metric has its value plus the step."""
    values = ({"step": step, **{name: value + step for name, value in metrics.items()}} for step in steps)
    return "".join(json.dumps(each) + "\n" for each in values)


def training(root: Path, metrics: str, config: str = "seed: 0\n", grids: Iterable[int] = ()) -> Path:
    """A training with these metrics, and grids of 4 x 4 pixels."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "plan.json").write_text(json.dumps({"workflow": "train", "stages": [], "transient_groups": []}))
    (root / "config.yaml").write_text(config)
    (root / "metrics.jsonl").write_text(metrics)
    for step in grids:
        (root / "grids").mkdir(exist_ok=True)
        write_png(root / "grids" / f"step-{step:08d}.png", np.full((4, 4, 3), step % 256, np.uint8))
    return root


def sampling(root: Path, prompts: Iterable[str], sizes: Iterable[int] = (4, 8), **fields: object) -> Path:
    """A sampling with one image per prompt and size; image i is of the colour i + size."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "plan.json").write_text(json.dumps({"workflow": "sample", "stages": [], "transient_groups": []}))
    images: list[Mapping[str, object]] = []
    for index, prompt in enumerate(prompts):
        file = f"{index:05d}.png"
        images.append({"file": file, "prompt": prompt, "seed": 100 + index, "key": None, **fields})
        for size in sizes:
            (root / f"images-{size}").mkdir(exist_ok=True)
            write_png(root / f"images-{size}" / file, np.full((size, size, 3), (index + size) % 256, np.uint8))
    write_sealed(root / "images.json", {"settings": {}, "stages": [], "sources": {}, "images": images})
    return root
