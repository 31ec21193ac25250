"""What does representation alignment cost with features of the store, and with the teacher in the training loop?

The teacher has DINOv2-small's configuration and random weights; images of 256 px become 16 x 16 patches of it. The
trainer's own step runs in turns without alignment, with features that precompute stored, and with features that the
teacher makes of each batch. Also: how near are stored features to those of the teacher, and how large?

    python -m benchmarks.teacher --out benchmarks/results/teacher.json
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from imagen_core.diffusion import Denoiser
from imagen_core.store import MIRRORED, Store
from imagen_core.train import TrainConfig
from imagen_core.train.alignment.projection import make_alignment
from imagen_core.train.averages.ema import WeightAverages
from imagen_core.train.checkpoints.state import TrainState
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.noise_levels import NoiseLevelSampler
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import Batch, BatchStream
from imagen_core.train.loss import TrainingLoss
from imagen_core.train.optimizer import make_optimizer
from imagen_core.train.parallel.world import World
from imagen_core.train.step import take_step
from stages.encoders.patches.config import PatchEncoderConfig
from stages.encoders.patches.encoder import PatchEncoder, load_patch_encoder
from tests.imagen_core.models.count import count_parameters
from tests.runs import precompute

SIDE_PX, SAMPLES, BATCH = 256, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--dir", type=Path, help="folder for temporary files")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each training")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768], help="of the networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        write_teacher(Path(folder) / "teacher")
        for dtype in ("float16", "int8"):
            found = near(Path(folder), dtype)
            rows.append({"what": f"features as {dtype}", **found})
            ratios[f"least cosine of a patch to the teacher's, {dtype}"] = found["least_cosine"]
        for width in arguments.widths:
            name, network = f"transformer of 12 blocks, {width} wide", {"dim": width, "num_heads": width // 64}
            seconds = steps(Path(folder), network, arguments.rounds)
            medians = {arm: statistics.median(each) for arm, each in seconds.items()}
            size = count_parameters(training(Path(folder), network, aligned=False).denoiser.network)
            rows.append({"what": name, "parameters": size, **{f"{arm}_s": value for arm, value in medians.items()}})
            for other in ("teacher", "none"):
                pairs = zip(seconds[other], seconds["stored"], strict=True)
                label = "teacher in the loop" if other == "teacher" else "no alignment"
                ratios[f"step, {label} / stored: {name}"] = statistics.median(a / b for a, b in pairs)
    report(
        "teacher",
        rows,
        ratios,
        arguments.out,
        packages=["imagen-precompute", "torch", "transformers"],
        notes=[
            f"processor time of the process, one thread: next batch and training step, batch {BATCH}, {SIDE_PX} px, "
            f"float32, patches of 16 px, median of {arguments.rounds} rounds in turns",
            "teacher: DINOv2-small's configuration, random weights, 224 px; with it in the loop, images are resized, "
            "normalised and encoded in each step",
            "bytes: of the features of an image and of its mirrored image together, with their scales",
        ],
    )


def write_teacher(folder: Path) -> None:
    """DINOv2-small with random weights of a trained model's size."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def encoder(folder: Path, dtype: str) -> dict[str, Any]:
    settings = {"name": "dino", "kind": "auto", "model": str(folder / "teacher"), "from_px": SIDE_PX, "dtype": dtype}
    return {**settings, "compute_dtype": "float32", "batch_size": 4, "cpu_threads": 1}


def live(folder: Path) -> PatchEncoder:
    return load_patch_encoder(PatchEncoderConfig.model_validate(encoder(folder, "float16")), 1)


def near(folder: Path, dtype: str) -> dict[str, Any]:
    """Precomputes features; their cosines to the teacher's, and bytes."""
    run = folder / dtype
    sizes = (f"source.num_samples={SAMPLES}", "source.dead_links=0", f"images.sizes_px=[{SIDE_PX}]")
    precompute(run, *sizes, f"image_encoders={json.dumps([encoder(folder, dtype)])}")
    samples, teacher = list(Store.open(run / "store")), live(folder)
    cosines: list[np.ndarray] = []
    for name, step in (("dino", 1), (f"dino{MIRRORED}", -1)):
        made = teacher.encode([sample.images[SIDE_PX][:, ::step] for sample in samples])
        for sample, expected in zip(samples, made, strict=True):
            stored = sample.arrays[name].astype(np.float32)
            if dtype == "int8":
                stored *= sample.arrays[f"{name}-scale"][..., None]
            lengths = np.linalg.norm(stored, axis=-1) * np.linalg.norm(expected, axis=-1)
            cosines.append((stored * expected).sum(-1) / lengths)
    return {
        "least_cosine": float(np.min(cosines)),
        "mean_cosine": float(np.mean(cosines)),
        "bytes": sum(each.nbytes for each in samples[0].arrays.values()),
    }


def training(folder: Path, network: dict[str, Any], *, aligned: bool) -> TrainConfig:
    unet = {
        "family": "transformer",
        "image_size_px": SIDE_PX,
        "patch_px": 16,
        "bottleneck_dim": 128,
        "text_dim": 64,
        "depth": 12,
    }
    settings: dict[str, Any] = {
        "store": str(folder / "int8/store"),
        "denoiser": {"unet": {**unet, **network}, "size_px": SIDE_PX},
        "text": "t5",
        "num_steps": 1000,
        "batch_size": BATCH,
        "views": {"horizontal_flip": True},
    }
    return TrainConfig.model_validate(
        {**settings, "alignment": {"encoder": "dino", "block": 8}} if aligned else settings
    )


def steps(folder: Path, network: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each step: without alignment, from the store, with the teacher."""
    world, teacher = World(0, 1, torch.device("cpu")), live(folder)

    def with_features(batch: Batch) -> Batch:
        images = [image.permute(1, 2, 0).numpy() for image in batch.images[SIDE_PX]]
        return replace(batch, raw={**batch.raw, "features": torch.from_numpy(np.stack(teacher.encode(images)))})

    arms: dict[str, tuple[bool, bool, Callable[[Batch], Batch]]] = {
        "none": (False, False, lambda batch: batch),
        "stored": (True, True, lambda batch: batch),
        "teacher": (True, False, with_features),
    }
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    ready: dict[str, tuple[TrainingContext, TrainState, BatchStream]] = {}
    for arm, (aligned, read, _) in arms.items():
        config = training(folder, network, aligned=aligned)
        stores = open_stores(config)
        torch.manual_seed(0)
        denoiser = Denoiser(config.denoiser).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        alignment = make_alignment(denoiser, config, stores, world.device)
        loss = TrainingLoss(denoiser, config, "cpu", alignment)
        further = {} if alignment is None else {f"alignment.{name}": p for name, p in alignment.named_parameters()}
        optimizer = make_optimizer(denoiser, config.optimizer, further)
        averages = WeightAverages(denoiser, config.ema.rates)
        state = TrainState(denoiser, optimizer, averages, NoiseLevelSampler(config), further)
        stream = BatchStream(stores, config if read else training(folder, network, aligned=False), world, None)
        ready[arm] = TrainingContext(config, stores, world, denoiser, loss), state, stream
    for number in range(rounds + 1):
        for arm, (_, _, prepare) in arms.items():
            context, state, stream = ready[arm]
            began = time.process_time()
            take_step(context, state, prepare(stream.next()), folder, stop=False)
            if number:  # the first step allocates
                taken[arm].append(time.process_time() - began)
    for _, _, stream in ready.values():
        stream.close()
    return taken


if __name__ == "__main__":
    main()
