"""The file of an adapter of DeepFloyd IF's network, in diffusers."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imagen_core.conversion.deepfloyd_unet import MAX_TOKENS, unet_config, unet_weights
from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.models import Conditioning
from imagen_core.train import LoraConfig
from imagen_core.train.lora.adapter import add_new_adapter, merge_adapter, saved_parameters
from imagen_core.train.lora.file import write_adapter
from tests.diffusers_layout import SIZES, TEXT_DIM, UNETS, unet_state
from tests.imagen_core.models.small import random_weights

LORAS = {
    "attention": LoraConfig(rank=4, alpha=10),
    "convolutions": LoraConfig(rank=2, targets=("conv1", "skip", "to_kv", "to_context", "conv_out")),
}


def pipeline(number: int) -> Any:
    """diffusers' pipeline of a stage with the tests' weights, without a text encoder."""
    diffusers = importlib.import_module("diffusers")
    unet = diffusers.UNet2DConditionModel.from_config(UNETS[number]).eval()
    unet.load_state_dict(unet_state(number))
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    schedulers = {"scheduler": diffusers.DDPMScheduler()}
    if number == 2:
        schedulers["image_noising_scheduler"] = diffusers.DDPMScheduler()
        return diffusers.IFSuperResolutionPipeline(**parts, **schedulers, unet=unet, requires_safety_checker=False)
    return diffusers.IFPipeline(**parts, **schedulers, unet=unet, requires_safety_checker=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", LORAS)
@torch.no_grad()
def test_diffusers_loads_the_adapter_of_its_own_network(tmp_path: Path, number: int, name: str) -> None:
    unet, size = unet_config(UNETS[number]), SIZES[number]
    low_res = {"low_res_px": size // 2, "low_res_noise": {"kind": "lognormal"}} if number == 2 else {}
    diffusion = {"schedule": {"kind": "discrete"}, "objective": "eps", "variance": "learned_range"}
    config = DenoiserConfig.model_validate({"unet": unet, "size_px": size, "diffusion": diffusion, **low_res})
    denoiser = Denoiser(config).eval()
    denoiser.net.load_state_dict(unet_weights(unet_state(number), unet))
    add_new_adapter(denoiser, LORAS[name])
    random_weights(nn.ParameterList(saved_parameters(denoiser).values()))
    write_adapter(tmp_path / "adapter.safetensors", denoiser, {"step": "7"})

    other = pipeline(number)
    x, text = torch.randn(2, 3, size, size), torch.randn(2, MAX_TOKENS, TEXT_DIM)
    step, level = torch.tensor([0, 500]), torch.tensor([250, 0])
    upsampled = torch.randn_like(x) if number == 2 else None
    joined = x if upsampled is None else torch.cat([x, upsampled], dim=1)
    conditioning = Conditioning(text=text, low_res=upsampled, low_res_noise=level.float() if number == 2 else None)

    def of_diffusers() -> torch.Tensor:
        return other.unet(joined, step, text, class_labels=level if number == 2 else None).sample

    before = of_diffusers()
    other.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    found = of_diffusers()
    assert float((found - before).abs().mean()) > 1e-3, "or the comparison would show nothing"
    torch.testing.assert_close(found, denoiser.net(x, step.float(), conditioning), rtol=1e-4, atol=1e-5)
    merge_adapter(denoiser)
    torch.testing.assert_close(found, denoiser.net(x, step.float(), conditioning), rtol=1e-4, atol=1e-5)
