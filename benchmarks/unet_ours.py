"""One training step of our UNets, timed as `unet_peers` times the others. Called by `benchmarks.unet`."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.unet_peers import BATCH, SIDE, TOKENS, WIDTH, serve
from imagen_core.diffusion import Denoiser, DenoiserConfig, diffusion_loss
from imagen_core.models import Conditioning
from imagen_core.models.layers.cpu import use_onednn
from imagen_core.train.components import OptimizerConfig
from imagen_core.train.optimizer import make_optimizer
from pipeline.executors.process import keep_freed_memory

MODELS: dict[str, dict[str, object]] = {
    "ours, Hybrid (imagen-pytorch's layout)": {
        "family": "hybrid",
        "dim": 88,
        "dim_mults": (1, 2, 4),
        "num_res_blocks": (1, 1, 1),
        "attention_levels": (False, True, True),
        "cross_attention_levels": (False, True, True),
        "norm": "rms",
        "qk_norm": True,
    },
    "ours, Regular (NeMo 500M's layout)": {
        "family": "regular",
        "embed_dim": 64,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 2,
        "attention_resolutions": (4, 8, 16),
        "cond_dim": 128,
    },
    "ours, Efficient (NeMo 600M's layout)": {
        "family": "efficient",
        "embed_dim": 64,
        "channel_mult": (1, 2, 4, 4),
        "num_res_blocks": (2, 4, 4, 4),
        "attention_levels": (False, True, True, True),
        "low_res": False,
    },
}


def main() -> None:
    name = sys.stdin.readline().strip()
    torch.manual_seed(0)
    unet = {"image_size_px": SIDE, "text_dim": WIDTH, **MODELS[name]}
    denoiser = Denoiser(DenoiserConfig.model_validate({"unet": unet, "size_px": SIDE}))
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use_onednn(denoiser)
    keep_freed_memory()
    optimizer = make_optimizer(denoiser, OptimizerConfig())
    serve(denoiser.net, loss_of(denoiser), optimizer)


def loss_of(denoiser: Denoiser) -> Callable[[], Tensor]:
    """Samples noise and noise levels, and computes the mean loss of the same batch."""
    images = torch.rand(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last) * 2 - 1
    text, mask = torch.randn(BATCH, TOKENS, WIDTH), torch.ones(BATCH, TOKENS, dtype=torch.bool)

    def loss() -> Tensor:
        sigma = denoiser.config.diffusion.schedule.sigma(torch.rand(BATCH))
        conditioning = Conditioning(text=text, text_mask=mask, text_keep=torch.rand(BATCH) > 0.1)
        return diffusion_loss(denoiser, images, sigma, torch.randn_like(images), conditioning).mean()

    return loss


if __name__ == "__main__":
    main()
