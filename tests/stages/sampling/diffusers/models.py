"""Tiny stages with random weights, as checkpoints or in memory."""

from pathlib import Path
from typing import Any

import torch

from imagen_core.cascade import CascadeStage, SamplingConfig
from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.train.checkpoints.checkpoint import write_checkpoint
from tests import tiny_networks

TEXT_DIM = 24
EFFICIENT = tiny_networks.EFFICIENT | {"text_dim": TEXT_DIM}
REGULAR = {
    "family": "regular",
    "image_size_px": 16,
    "embed_dim": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "head_dim": 16,
    "cond_dim": 32,
    "text_dim": TEXT_DIM,
}
HYBRID = tiny_networks.HYBRID | {"max_text_tokens": 12, "text_dim": TEXT_DIM}
TRANSFORMER = tiny_networks.TRANSFORMER | {"text_dim": TEXT_DIM}
SUPER = {"low_res": True, "low_res_noise": True}
DISCRETE = {"schedule": {"kind": "discrete", "num_steps": 50, "beta": "cosine"}, "objective": "eps"}
ENCODER = {
    "name": "t5",
    "dim": TEXT_DIM,
    "dtype": "float16",
    "fingerprint": {"kind": "given", "model": "T5 of the data's owner", "revision": None},
}
"""An encoder that came with the data, so that nothing has to be found."""


def denoiser(unet: dict[str, Any], size_px: int = 16, **settings: Any) -> Denoiser:
    """With random weights in every layer, those that begin as zero too."""
    built = Denoiser(DenoiserConfig.model_validate({"size_px": size_px, "unet": unet, **settings}))
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return built.eval()


def stage(unet: dict[str, Any], sampling: dict[str, Any] | None = None, **settings: Any) -> CascadeStage:
    return CascadeStage(denoiser(unet, **settings), SamplingConfig.model_validate(sampling or {}))


def save(folder: Path, trained: Denoiser, encoder: dict[str, Any] | None = None) -> str:
    """A run folder with one checkpoint; the path as text."""
    state = {"samples": 0, "ema_updates": 0, "loader": None, "config": {"max_tokens": 12}, "encoder": encoder}
    state["denoiser"] = trained.config.model_dump(mode="json")
    write_checkpoint(folder / "checkpoints", 3, {"model": trained.state_dict()}, state)
    return str(folder)
