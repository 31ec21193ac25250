"""How fast does the trainer train NeMo's 500M base and 600M super-resolution model on one GPU, in bfloat16?

The trainer itself runs, on a store of random images and captions, with torch.compile off and on. Samples per second
are compared with what NVIDIA publishes for NeMo per GPU (4 nodes, global batch x batches/s / 32 GPUs), and the model's
FLOP/s with the card's bfloat16 matmul rate, measured in the same run.

    python -m benchmarks.unet_gpu --out benchmarks/results/unet_gpu.json
    python -m benchmarks.unet_gpu --tiny       # small models, to see that the script works; on a CPU too
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import workflows
from benchmarks.common import matmul_flops, report
from benchmarks.store_formats import Captions, write_store
from imagen_core.models import Conditioning
from imagen_core.train import TrainConfig, train
from pipeline.config import load_config
from workflows.train import TrainWorkflowConfig

CONFIGS = Path(workflows.__file__).parent / "configs" / "train"
SAMPLES, MEAN_TOKENS = 1024, 20
# samples/s of one GPU, NeMo-Framework-Launcher 4871db06, README 8.7.2
NEMO: dict[str, dict[str, float]] = {
    "nemo-base64-500m": {"A100": 95.3, "H100": 202.4},
    "nemo-sr256-600m": {"A100": 80.9, "H100": 170.8},
}
TINY: dict[str, Any] = {
    "family": "efficient",
    "embed_dim": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "attention_levels": [False, True],
    "head_dim": 32,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--dir", type=Path, help="folder for temporary files (a checkpoint of 10 GB)")
    parser.add_argument("--tiny", action="store_true", help="small models and 4 steps, to try the script anywhere")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run; the second half is measured")
    parser.add_argument("--micro-batch", type=int, default=64, help="images at once; NeMo's figures are with 64")
    parser.add_argument("--models", nargs="+", choices=list(NEMO), default=list(NEMO))
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        print("no CUDA device: nothing measured (--tiny tries the script on a CPU)")
        return
    if arguments.tiny:
        arguments.steps, arguments.micro_batch = 4, 4
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        root = Path(folder) / "store"
        write_store(root, Captions.make(SAMPLES, 1024, MEAN_TOKENS), random_images(tiny=arguments.tiny), "parquet")
        matmul = matmul_flops()
        for name in arguments.models:
            for compiled in (False, True):
                config = training_config(name, root, arguments, compiled=compiled)
                summary = train(config, Path(folder) / f"{name}-{compiled}")
                (Path(summary["checkpoint"]) / "optimizer.safetensors").unlink()  # disk is needed by the next one
                flops = training_flops(config)
                rows.append(
                    {
                        "model": name,
                        "compile": compiled,
                        "images_per_s": summary["images_per_s"],
                        "loader_wait": summary["loader_wait"],
                        "tflop_per_image": flops / 1e12,
                        "tflop_per_s": flops * summary["images_per_s"] / 1e12,
                        "model_flops_utilisation": flops * summary["images_per_s"] / matmul,
                        "peak_memory_gib": summary["peak_memory_bytes"] / 2**30,
                    }
                )
    report(
        "unet_gpu",
        rows,
        ratios(rows, tiny=arguments.tiny),
        arguments.out,
        packages=["imagen-precompute", "torch"],
        notes=[
            f"device: {torch.cuda.get_device_name() if on_gpu else 'CPU'}; bfloat16 matmul of 8192 x 8192: "
            f"{matmul / 1e12:.1f} TFLOP/s",
            f"steps of {arguments.micro_batch} samples with optimizer and weight average; the rest as in the shipped "
            "configuration of the same name",
            "FLOPs: forward and backward of the model, multiply and add counted as two",
            *(["--tiny: small models instead of the named ones"] if arguments.tiny else []),
        ],
    )


def ratios(rows: list[dict[str, Any]], *, tiny: bool) -> dict[str, float]:
    """Ratios of rates; with small models, ratios to NeMo's would mean nothing."""
    found: dict[str, float] = {}
    for plain, compiled in zip(rows[::2], rows[1::2], strict=True):
        name, best = plain["model"], max(plain["images_per_s"], compiled["images_per_s"])
        found[f"{name}: compiled / plain"] = compiled["images_per_s"] / plain["images_per_s"]
        if not tiny:
            for card, rate in NEMO[name].items():
                found[f"{name}: ours here / NeMo on {card} as published"] = best / rate
    return found


def training_config(name: str, root: Path, arguments: argparse.Namespace, *, compiled: bool) -> TrainConfig:
    """A shipped configuration, one micro-batch per step; or a small model instead, on images a quarter as wide."""
    overrides = [
        f"store={root}",
        f"compute.compile={str(compiled).lower()}",
        f"num_steps={arguments.steps}",
        f"batch_size={arguments.micro_batch}",
        "micro_batch_size=null",
        f"logging.every_steps={arguments.steps // 2}",
    ]
    shipped = load_config(TrainWorkflowConfig, CONFIGS / f"{name}.yaml", overrides).training()
    if not arguments.tiny:
        return shipped
    denoiser = shipped.denoiser
    sizes = {"size_px": denoiser.size_px // 4, "low_res_px": denoiser.low_res_px and denoiser.low_res_px // 4}
    unet = {
        **TINY,
        "image_size_px": sizes["size_px"],
        "low_res": denoiser.unet.low_res,
        "text_dim": denoiser.unet.text_dim,
    }
    return TrainConfig.model_validate(
        {**shipped.model_dump(), "denoiser": {**denoiser.model_dump(), **sizes, "unet": unet}}
    )


def random_images(*, tiny: bool) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(1)
    sides = (16, 64) if tiny else (64, 256)
    return {side: rng.integers(0, 256, (SAMPLES, side, side, 3), np.uint8) for side in sides}


def training_flops(config: TrainConfig) -> float:
    """FLOPs of one image, forward and backward, counted on the meta device."""
    unet_config, side = config.denoiser.unet, config.side_px
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet = unet_config.build()
        text = None if unet_config.text_dim is None else torch.randn(1, MEAN_TOKENS, unet_config.text_dim)
        mask = None if text is None else torch.ones(1, MEAN_TOKENS, dtype=torch.bool)
        low_res = torch.randn(1, unet_config.in_channels, side, side) if unet_config.low_res else None
        x = torch.randn(1, unet_config.in_channels, side, side)
        unet(x, torch.randn(1), Conditioning(text=text, text_mask=mask, low_res=low_res)).sum().backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
