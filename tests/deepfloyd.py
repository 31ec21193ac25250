"""Tiny pipelines of DeepFloyd IF, as diffusers saves them."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.stages.encoders.recipes.pipelines import t5

SMALL, LARGE = 16, 32
"""Sides of the images of stages I and II, in pixels."""
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "out_channels": 6,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
STATIC = DYNAMIC | {"sample_max_value": 1.0}


def network(text_dim: int, *, low_res: bool) -> Any:
    """A network of a stage, with random weights.

    The last ones are small: else a difference of rounding would grow at each step, as in no trained network, and
    variances would lie outside the learned range.
    """
    build = importlib.import_module("diffusers").UNet2DConditionModel
    torch.manual_seed(int(low_res))
    size, more = (LARGE, {"class_embed_type": "timestep"}) if low_res else (SMALL, {})
    unet = build(sample_size=size, in_channels=6 if low_res else 3, encoder_hid_dim=text_dim, **UNET, **more).eval()
    with torch.no_grad():
        unet.conv_out.weight *= 0.1
    return unet


def pipeline(unet: Any, scheduler: Any, **encoder: Any) -> Any:
    """Stage I, or II for a network that reads a low-resolution image; `encoder`: text_encoder and tokenizer."""
    diffusers = importlib.import_module("diffusers")
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    parts = {**nothing, **encoder, "unet": unet, "scheduler": scheduler, "requires_safety_checker": False}
    if unet.config.in_channels == 3:
        found = diffusers.IFPipeline(**parts)
    else:
        noising = diffusers.DDPMScheduler(**SCHEDULE)
        found = diffusers.IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)
    found.set_progress_bar_config(disable=True)
    return found


def save_pipelines(folder: Path) -> list[str]:
    """`folder/I` with a text encoder, and `folder/II` without; their paths."""
    diffusers, transformers = (importlib.import_module(name) for name in ("diffusers", "transformers"))
    torch.manual_seed(2)
    t5()(folder / "t5")
    encoder = {
        "text_encoder": transformers.T5EncoderModel.from_pretrained(folder / "t5"),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder / "t5"),
    }
    dim = encoder["text_encoder"].config.d_model
    for name, threshold, parts in (("I", DYNAMIC, encoder), ("II", STATIC, {})):
        scheduler = diffusers.DDPMScheduler(**SCHEDULE, **threshold, variance_type="learned_range")
        pipeline(network(dim, low_res=name == "II"), scheduler, **parts).save_pretrained(folder / name)
    return [str(folder / name) for name in ("I", "II")]


class SameNoise:
    """Numbers in the order in which diffusers takes them from one generator for each image."""

    def __init__(self, seeds: Sequence[int], stream: int):
        self.generators, self.stream, self.calls = generators(seeds, stream), stream, 0

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, shape: Sequence[int], device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        self.calls += 1
        if self.stream == 1 and self.calls == 1:  # we noise the low-resolution image first, diffusers second
            self.start = self._next(shape)
        return self.start if self.stream == 1 and self.calls == 2 else self._next(shape)

    def _next(self, shape: Sequence[int]) -> Tensor:
        return torch.cat([torch.randn(1, *shape, generator=generator) for generator in self.generators])


def generators(seeds: Sequence[int], stream: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 * stream + seed) for seed in seeds]
