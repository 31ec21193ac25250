"""Tiny pipelines in the layout of DeepFloyd IF's on the hub, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from imagen_core.conversion.deepfloyd_unet import diffusers_weights, unet_config

TEXT_DIM = 64
"""Width of tiny-random-t5."""
SIZES = {1: 16, 2: 32}
"""Side of the images of stages I and II, in pixels."""
CLASSES = {1: "IFPipeline", 2: "IFSuperResolutionPipeline"}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.42.1",
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "out_channels": 6,
    "cross_attention_dim": 32,
    "encoder_hid_dim": TEXT_DIM,
    "attention_head_dim": 8,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
UNETS: dict[int, dict[str, Any]] = {
    1: _UNET | {"sample_size": SIZES[1], "in_channels": 3, "layers_per_block": 1, "block_out_channels": [32, 64]},
    2: _UNET
    | {
        "sample_size": SIZES[2],
        "in_channels": 6,
        "layers_per_block": [1, 2],
        "block_out_channels": [32, 96],
        "class_embed_type": "timestep",
        "time_embedding_dim": 64,
        "time_embedding_act_fn": "gelu",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1 / 0.7071,
        "mid_block_scale_factor": 1 / 0.7071,
    },
}
"""unet/config.json of each stage: the published ones, with few and narrow levels."""
NOISING = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
SCHEDULERS: dict[int, dict[str, Any]] = {
    number: NOISING
    | {
        "variance_type": "learned_range",
        "prediction_type": "epsilon",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": {1: 1.5, 2: 1.0}[number],
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    for number in (1, 2)
}
"""scheduler/scheduler_config.json of each stage, as published."""


def unet_state(number: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a stage's UNet under diffusers' names; no layer is zero."""
    torch.manual_seed(seed)
    config = unet_config(UNETS[number])
    tensors = {name: 0.1 * torch.randn_like(value) for name, value in config.build().named_parameters()}
    return diffusers_weights(tensors, config)


def write_pipeline(folder: Path, number: int, *, weights: bool = True) -> Path:
    """Writes a pipeline of stage I or II, without a text encoder."""
    parts: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    write_json(folder / "unet/config.json", UNETS[number])
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULERS[number])
    if number == 2:
        parts["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
        write_json(folder / "image_noising_scheduler/scheduler_config.json", NOISING)
    write_json(folder / "model_index.json", {"_class_name": CLASSES[number], **parts})
    if weights:
        save_file(unet_state(number), folder / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
