"""Images sampled by our cascade, timed as `sampling_peers` times the others. Called by `benchmarks.sampling`.

It runs with the code of an earlier commit, too: what that lacks is left out.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from benchmarks.sampling_peers import GUIDANCE, LOW_RES, TOKENS, WIDTH, serve
from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.diffusion import Denoiser, DenoiserConfig

try:
    from imagen_core.models.layers.inference import optimize_for_cpu
except ImportError:
    optimize_for_cpu = None

HYBRID, IF = "ours, Hybrid (imagen-pytorch's layout)", "ours, Regular (IF's layout)"
MODELS = (HYBRID, IF)


def hybrid(side: int) -> dict[str, Any]:
    unet: dict[str, Any] = {
        "family": "hybrid",
        "image_size_px": side,
        "text_dim": WIDTH,
        "norm": "rms",
        "qk_norm": True,
    }
    if side <= LOW_RES:
        attends = (False, True, True)
        unet |= {"dim": 88, "dim_mults": (1, 2, 4), "num_res_blocks": (1, 1, 1)}
        unet |= {"attention_levels": attends, "cross_attention_levels": attends}
        return {"unet": unet, "size_px": side}
    unet |= {"dim": 64, "dim_mults": (1, 2, 4), "num_res_blocks": (2, 2, 2), "memory_efficient": True}
    unet |= {"attention_levels": (False,) * 3, "cross_attention_levels": (False, False, True)}
    return {"unet": unet | {"low_res": True, "low_res_noise": True}, "size_px": side, **_noise()}


def regular(side: int) -> dict[str, Any]:
    low_res = side > LOW_RES
    unet: dict[str, Any] = {
        "family": "regular",
        "image_size_px": side,
        "embed_dim": 64,
        "channel_mult": (1, 2, 3, 4) if low_res else (1, 3, 4),
        "num_res_blocks": 1 if low_res else 2,
        "attention_resolutions": (side // 8,) if low_res else (side // 2, side // 4),
        "shared_norm": True,
        "text_dim": WIDTH,
        "cond_dim": WIDTH,
        "padded_tokens": TOKENS,
        "dropped_caption": "empty_caption",
        "pooling": "multihead",
        "pooling_heads": 8,
        "out_channels": 6,
        "resblock_updown": True,
        "activation": "gelu",
        "time_activations": 2,
        "head_dim": 64,
    }
    diffusion = {"schedule": {"kind": "discrete"}, "objective": "eps", "variance": "learned_range"}
    if not low_res:
        return {"unet": unet, "diffusion": diffusion, "size_px": side}
    return {
        "unet": unet | {"low_res": True, "low_res_noise": True},
        "diffusion": diffusion,
        "size_px": side,
        **_noise(),
    }


def _known(config: dict[str, Any]) -> DenoiserConfig:
    """The configuration without options that an earlier commit does not know."""
    while True:
        try:
            return DenoiserConfig.model_validate(config)
        except ValidationError as error:
            where = [part for part in error.errors()[0]["loc"] if part not in ("regular", "hybrid")]
            if optimize_for_cpu is not None:
                raise
            inner = config
            for part in where[:-1]:
                inner = inner[str(part)]
            del inner[str(where[-1])]


def _noise() -> dict[str, Any]:
    return {"low_res_px": LOW_RES, "low_res_noise": {"kind": "lognormal"}}


def sampler(name: str, side: int, batch: int, steps: int) -> tuple[Denoiser, Callable[[], dict[int, Tensor]]]:
    config = hybrid(side) if name.startswith(HYBRID) else regular(side)
    denoiser = Denoiser(_known(config)).eval()
    sampling = {"num_steps": steps, "guidance": {"text": GUIDANCE}}
    if not name.startswith(HYBRID):
        sampling["grid"] = {"kind": "uniform"}
    stage = CascadeStage(denoiser, SamplingConfig.model_validate(sampling))
    encoder = {"name": "t5", "dim": WIDTH, "dtype": "float32", "fingerprint": {}}
    cascade, dice = Cascade([stage], encoder), np.random.default_rng(0)
    text = [dice.standard_normal((TOKENS, WIDTH), np.float32) for _ in range(batch)]
    more: dict[str, Any] = {}
    if getattr(denoiser.config.network, "needs_empty_caption", False):
        more["null_text"] = dice.standard_normal((1, WIDTH), np.float32)
    if side > LOW_RES:
        more["low_res"] = torch.rand(batch, 3, LOW_RES, LOW_RES) * 2 - 1
    return denoiser, lambda: cascade.sample(text, list(range(batch)), **more)


def main() -> None:
    case = json.loads(sys.stdin.readline())
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    denoiser, sample = sampler(case["name"], case["side"], case["batch"], case["steps"])
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    if optimize_for_cpu is not None:
        optimize_for_cpu(denoiser)
    serve(parameters, sample)


if __name__ == "__main__":
    main()
