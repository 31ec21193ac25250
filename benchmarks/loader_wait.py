"""Which part of a training step waits for the store? Captions of about 20 x 4096 float16, as T5-XXL makes them.

The trainer itself runs on a store of such captions and reports how long it waited. Then the same loader runs alone:
how many times faster than the training is it?

    python -m benchmarks.loader_wait --out benchmarks/results/loader_wait.json
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from benchmarks.store_formats import Captions, write_store
from imagen_core.train import TrainConfig, train
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import BatchStream
from imagen_core.train.parallel.world import World
from tests.imagen_core.models.count import count_parameters

DIM, MEAN_TOKENS, SAMPLES = 4096, 20, 1024
TRAININGS: dict[str, dict[str, Any]] = {
    "small base at 16 px": {
        "batch_size": 32,
        "num_steps": 60,
        "unet": {"embed_dim": 32, "channel_mult": [3, 3], "num_res_blocks": [1, 2], "attention_levels": [True, True]},
        "side_px": 16,
    },
    "base at 64 px": {
        "batch_size": 4,
        "num_steps": 12,
        "unet": {
            "embed_dim": 64,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 4, 4, 4],
            "attention_levels": [False, True, True, True],
        },
        "side_px": 64,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--dir", type=Path, help="folder for temporary files")
    parser.add_argument("--steps", type=int, help="steps of each training, instead of 60 and 12")
    arguments = parser.parse_args()
    captions = Captions.make(SAMPLES, DIM, MEAN_TOKENS)
    rng = np.random.default_rng(1)
    pixels = {
        side: rng.integers(0, 256, (SAMPLES, side, side, 3), np.uint8)
        for side in {training["side_px"] for training in TRAININGS.values()}
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        root = Path(folder) / "store"
        write_store(root, captions, pixels, "parquet")
        for index, (name, training) in enumerate(TRAININGS.items()):
            config = training_config(root, training, arguments.steps)
            summary = train(config, Path(folder) / str(index))
            alone = loader_alone(config)
            rows.append(
                {
                    "training": name,
                    "parameters": count_parameters(config.denoiser.unet),
                    "batch": config.batch_size,
                    "images_per_s": summary["images_per_s"],
                    "loader_wait": summary["loader_wait"],
                    "loader_alone_images_per_s": alone,
                }
            )
    tokens = len(captions.tokens) / len(captions)
    report(
        "loader_wait",
        rows,
        {
            **{f"part of a step spent waiting: {row['training']}": row["loader_wait"] for row in rows},
            **{
                f"loader alone / training: {row['training']}": row["loader_alone_images_per_s"] / row["images_per_s"]
                for row in rows
            },
        },
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            f"{SAMPLES} samples, {tokens:.1f} x {DIM} float16 a caption, shuffled, warm page cache",
            "loader_wait: time the trainer waited for batches / all time, over the second half of its steps",
            "loader alone: the trainer's own stream of batches, read with nothing else to do",
        ],
    )


def training_config(root: Path, training: dict[str, Any], steps: int | None) -> TrainConfig:
    num_steps: int = steps or training["num_steps"]
    side = training["side_px"]
    unet = {
        "family": "efficient",
        "image_size_px": side,
        "text_dim": DIM,
        "head_dim": 32,
        "low_res": False,
        **training["unet"],
    }
    return TrainConfig.model_validate(
        {
            "store": str(root),
            "denoiser": {
                "unet": unet,
                "size_px": side,
                "diffusion": {"schedule": {"kind": "log_normal"}, "objective": "edm"},
            },
            "text": "t5",
            "num_steps": num_steps,
            "batch_size": training["batch_size"],
            "logging": {"every_steps": max(1, num_steps // 2)},
        }
    )


def loader_alone(config: TrainConfig, seconds: float = 3.0) -> float:
    """Samples per second of the trainer's stream of batches."""
    stream = BatchStream(open_stores(config), config, World(0, 1, torch.device("cpu")), None)
    try:
        stream.next()
        began, samples = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            samples += stream.next().global_size
        return samples / (time.perf_counter() - began)
    finally:
        stream.close()


if __name__ == "__main__":
    main()
