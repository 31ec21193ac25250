"""A small store, small models and small training runs, the same for all tests here."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from imagen_core import store as st
from imagen_core.diffusion import Denoiser
from imagen_core.train import TrainConfig
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import Batch, BatchStream
from imagen_core.train.loss import TrainingLoss
from imagen_core.train.parallel.world import World
from tests import tiny_networks
from tests.imagen_core.store.handmade_store import ORIGINALS, bucket_list

ALONE = World(0, 1, torch.device("cpu"))
DIM = 8
BASE_UNET = {
    "family": "regular",
    "image_size_px": 16,
    "embed_dim": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "head_dim": 16,
    "text_dim": DIM,
    "cond_dim": 16,
}
BASE = {"unet": BASE_UNET, "size_px": 16}
SUPER = {
    "unet": BASE_UNET | {"image_size_px": 32, "low_res": True, "low_res_noise": True},
    "size_px": 32,
    "low_res_px": 16,
    "low_res_noise": {"kind": "lognormal"},
}
FLOW = {
    "schedule": {"kind": "flow", "mean": 0.8, "std": 0.8, "uniform_fraction": 0.1, "shift_from_px": 16, "size_px": 32},
    "objective": "x0",
    "loss_space": "velocity",
    "velocity_min_t": 0.05,
}
TRANSFORMER_UNET = tiny_networks.TRANSFORMER | {"text_dim": DIM}
TRANSFORMER = {"unet": TRANSFORMER_UNET, "size_px": 16}
TRANSFORMER_SUPER = SUPER | {
    "unet": TRANSFORMER_UNET | {"image_size_px": 32, "low_res": True, "low_res_noise": True, "time": "shared"}
}


def make_store(
    root: Path,
    *,
    rows: tuple[int, ...] = (24, 16),
    model: str = "tiny",
    dim: int = DIM,
    large_px: int = 32,
    row_fields: Callable[[int], dict[str, Any]] = lambda row: {},
    buckets: bool = False,
    more_encoders: Mapping[str, int] | None = None,
    features: int | None = None,
    mirrored: bool = True,
) -> Path:
    """40 samples of 16 and 32 px, one caption each of 1 to 5 tokens; deterministic. Written once.

    Args:
        large_px: another size instead of 32, and its half instead of 16.
        row_fields: fields of the samples by row.
        more_encoders: widths of further encoders by name, whose captions have 1 to 3 tokens.
        features: width of patch features `dino` of 4 x 4 px of the smaller size, float16, and if `mirrored` others of
            the mirrored images.
        buckets: images are wide, tall and square in turn (12 x 20, 20 x 12 and 16 x 16 px, and twice that).
    """
    if (root / "manifest.json").exists():
        return root
    rng = np.random.default_rng(0)
    groups: dict[str, dict[str, Any]] = {"samples": {"kind": "samples"}}
    for size in (large_px // 2, large_px):
        group = {"kind": "images", "size_px": size, "format": "parquet", "codec": "raw"}
        shapes = {"config": {"shapes": [list(shape) for shape in bucket_list(size)]}} if buckets else {}
        groups[st.image_group(size)] = group | shapes
    for name, width in {"t5": dim, **(more_encoders or {})}.items():
        groups[f"text-{name}"] = {
            "kind": "text",
            "encoder": name,
            "dim": width,
            "dtype": "float16",
            "format": "parquet",
            "fingerprint": {"model": model if name == "t5" else name},
        }
    specs = {} if features is None else st.feature_specs("dino", "float16", (None, None), features, mirrored=mirrored)
    for name, spec in specs.items():
        group = {"kind": "array", "array": name, "dtype": spec.dtype, "shape": list(spec.shape), "format": "parquet"}
        groups[st.array_group(name)] = group | {"fingerprint": {"model": "dino"}}
    for name in groups:
        (root / name).mkdir(parents=True)
    shards = []
    for shard, count in enumerate(rows):
        paths = {name: st.shard_path(name, shard, "parquet") for name in groups}
        samples = [
            replace(
                st.SampleRow(f"{shard}-{row:03d}", (f"caption {row}",), (row,), None, "0" * 64, 32, 32, row),
                **row_fields(row),
            )
            for row in range(count)
        ]
        st.write_samples(root / paths["samples"], samples)
        half = large_px // 2
        if buckets:
            samples = [
                replace(sample, width=width, height=height)
                for row, sample in enumerate(samples)
                for width, height in [ORIGINALS[row % 3]]
            ]
            st.write_samples(root / paths["samples"], samples)
        of_row = [bucket_list(half)[(2, 0, 1)[row % 3]] if buckets else (half, half) for row in range(count)]
        large = [rng.integers(0, 256, (2 * h, 2 * w, 3), dtype=np.uint8) for h, w in of_row]
        small = [
            pixels.reshape(h, 2, w, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
            for pixels, (h, w) in zip(large, of_row, strict=True)
        ]
        for size, images in ((large_px, large), (half, small)):
            name = st.image_group(size)
            shapes = bucket_list(size) if buckets else ()
            with st.open_image_writer(root / paths[name], size, "parquet", shapes=shapes) as writer:
                for pixels, sample in zip(images, samples, strict=True):
                    writer.append(pixels, sample.key, sample.sha256)
        for number, (name, spec) in enumerate(specs.items()):
            group, random = st.array_group(name), np.random.default_rng([shard, number])
            fingerprint = groups[group]["fingerprint"]
            with st.open_array_writer(root / paths[group], spec, "parquet", fingerprint) as writer:
                for (h, w), sample in zip(of_row, samples, strict=True):
                    writer.append(random.normal(1, 1, (h // 4, w // 4, features)).astype(np.float16), sample.key)
        captions = [sample.captions[0] for sample in samples]
        for name, width in {"t5": dim, **(more_encoders or {})}.items():
            longest, random = (5, rng) if name == "t5" else (3, np.random.default_rng([width, shard]))
            embeddings = [random.normal(size=(1 + row % longest, width)).astype(np.float32) for row in range(count)]
            st.write_embedding_shard(
                root / paths[f"text-{name}"],
                st.cast_embeddings(embeddings, width, "float16"),
                [len(embedding) for embedding in embeddings],
                width,
                "float16",
                "parquet",
                captions=captions,
                fingerprint=groups[f"text-{name}"]["fingerprint"],
            )
        files = {name: _entry(root, path, count) for name, path in paths.items()}
        shards.append({"index": shard, "rows": count, "files": files})
    st.write_manifest(root / "manifest.json", {"writer": "test", "groups": groups}, shards)
    return root


def _entry(root: Path, path: str, rows: int) -> dict[str, Any]:
    data = (root / path).read_bytes()
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": rows}


def make_config(store: Path | None, **changes: Any) -> TrainConfig:
    """A base model of 16 px on the small store (None: on those of `stores`): 6 steps of 8 images in float64."""
    settings: dict[str, Any] = {
        "store": store and str(store),
        "denoiser": BASE,
        "text": "t5",
        "num_steps": 6,
        "batch_size": 8,
        "precision": "float64",
        "compute": {"channels_last": False},  # slower with float64 on a CPU
        "optimizer": {"lr": 1e-3, "warmup_steps": 3},
        "ema": {"rates": [0.9, 0.5]},
        "logging": {"every_steps": 1},
    }
    return TrainConfig.model_validate(settings | changes)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration with some settings changed; a dict changes the named settings of a component only."""
    settings = config.model_dump()
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    return TrainConfig.model_validate(settings)


def make_context(config: TrainConfig, denoiser: Denoiser) -> TrainingContext:
    """What one process works with to evaluate this denoiser."""
    return TrainingContext(config, open_stores(config), ALONE, denoiser, TrainingLoss(denoiser, config, "cpu"))


def first_batch(config: TrainConfig) -> Batch:
    """What a training of one process reads first."""
    stream = BatchStream(open_stores(config), config, ALONE, None)
    try:
        return stream.next()
    finally:
        stream.close()


def tensors(checkpoint: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by file and name."""
    return {
        f"{path.stem}/{name}": values
        for path in sorted(Path(checkpoint).glob("*.safetensors"))
        for name, values in load_file(path).items()
    }


def files(checkpoint: str | Path) -> dict[str, bytes]:
    """The bytes of every file of tensors."""
    return {path.name: path.read_bytes() for path in sorted(Path(checkpoint).glob("*.safetensors"))}


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
