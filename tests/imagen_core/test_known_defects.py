"""Defects found in the systems this library succeeds; each must not appear here.

The numbers X1 ... X7 are NeMo Imagen's, in the order they were found; its X7 (documented sizes that do not match the
shipped configurations) is the table of tests/workflows/test_train_presets.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from imagen_core.cascade import SamplingConfig
from imagen_core.diffusion import Denoiser, DenoiserConfig, Guidance, Threshold, diffusion_loss, guided
from imagen_core.diffusion.schedules import Discrete, LogNormal
from imagen_core.diffusion.steps import Karras
from imagen_core.models import Conditioning
from imagen_core.models.layers.attention import PixelAttention
from imagen_core.samplers import Ancestral, Heun, SeededNoise, sample
from pipeline.cli.presets import find_config
from pipeline.config import load_config
from tests.imagen_core.models.small import TEXT_DIM, random_weights, regular
from workflows.train import TrainWorkflowConfig


def denoiser(**changes: Any) -> Denoiser:
    low_res = bool(changes.get("low_res"))
    config = DenoiserConfig(unet=regular(**changes), size_px=16, low_res_px=8 if low_res else None)
    return random_weights(Denoiser(config))


def captions(batch: int) -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    return Conditioning(text=torch.randn(batch, 5, TEXT_DIM, generator=generator), text_mask=mask)


@pytest.mark.parametrize(("kind", "largest"), [("none", 3.0), ("static", 1.0), ("dynamic", 1.0)])
def test_x1_the_samplers_threshold_is_the_one_asked_for(kind: str, largest: float) -> None:
    class Constant(Denoiser):
        def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            return torch.linspace(-3, 3, x[0].numel()).reshape(x[0].shape).expand_as(x)

    model = Constant(denoiser().config)
    threshold = Threshold.model_validate({"kind": kind})
    denoise = guided(model, captions(1), Guidance(), threshold)
    x0 = sample(Heun(), denoise, Karras().sigmas(LogNormal(), 4), SeededNoise([0]), (3, 16, 16))
    assert float(x0.abs().max()) == pytest.approx(largest, abs=1e-4)
    inside = float((x0.abs() > 0.999).float().mean())  # static saturates two thirds, dynamic the top half a percent
    assert (inside > 0.6) == (kind in ("static", "none"))


def test_x2_ancestral_sampling_works_for_a_regular_unet_with_low_resolution_input() -> None:
    model = denoiser(low_res=True).eval()
    conditioning = model.with_sampling_low_res(captions(2), torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 16, 16))
    denoise = guided(model, conditioning, Guidance(text=2.0), Threshold())
    x0 = sample(Ancestral(), denoise, Karras().sigmas(LogNormal(), 3), SeededNoise([0, 1]), (3, 16, 16))
    assert x0.isfinite().all()


@pytest.mark.parametrize("kind", ["cross", "fused"])
def test_x3_masked_attention_in_float32_has_a_backward_pass(kind: str) -> None:
    attention = random_weights(PixelAttention(32, kind=kind, head_dim=16, context_dim=TEXT_DIM))  # type: ignore[arg-type]
    x = torch.randn(2, 32, 4, 4, requires_grad=True)
    context = torch.randn(2, 5, TEXT_DIM, requires_grad=True)
    mask = torch.tensor([[True, True, False, False, False], [False] * 5])
    attention(x, context, mask).square().sum().backward()
    assert x.grad is not None
    assert context.grad is not None
    assert x.grad.isfinite().all()
    assert context.grad.isfinite().all()
    assert float(context.grad[~mask].abs().max()) == 0
    assert float(context.grad[mask].abs().min()) > 0


def test_x4_caption_dropout_works_on_the_cpu() -> None:
    model = denoiser()
    kept = torch.tensor([True, False])
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    with_text, other_text = captions(2), captions(2)
    assert other_text.text is not None
    dropped = replace(with_text, text_keep=kept)
    changed = replace(other_text, text=other_text.text + 1, text_keep=kept)
    first, second = model(x, sigma, dropped), model(x, sigma, changed)
    assert not torch.allclose(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])


@pytest.mark.parametrize(
    "name", ["sr256-400m-edm", "sr256-450m-edm", "sr256-600m-edm", "sr256-600m-edm-noise", "sr1024-600m"]
)
def test_x5_the_super_resolution_configurations_start(name: str) -> None:
    narrow = ["denoiser.unet.embed_dim=32", "denoiser.unet.head_dim=32", "denoiser.unet.text_dim=12"]
    config = load_config(TrainWorkflowConfig, find_config("train", f"nemo-{name}"), narrow)
    model = Denoiser(config.denoiser)
    noise = torch.randn(1, 3, 32, 32)
    conditioning = model.with_low_res(captions(1), torch.zeros(1, 3, 8, 8), torch.tensor([0.1]), noise)
    loss = diffusion_loss(model, torch.zeros(1, 3, 32, 32), torch.ones(1), noise, conditioning)
    loss.mean().backward()
    assert loss.isfinite().all()


def test_x6_attention_runs_on_the_same_kernel_in_training_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counted)
    model = denoiser()
    x, sigma = torch.randn(1, 3, 16, 16), torch.ones(1)
    model.train()(x, sigma, captions(1))
    training = len(calls)
    with torch.no_grad():
        model.eval()(x, sigma, captions(1))
    assert training > 0
    assert len(calls) == 2 * training


def test_a_stray_comma_in_yaml_is_no_setting() -> None:
    # PaddleFleetX ships `dynamic_thresholding: True,`, which YAML reads as the string "True,".
    with pytest.raises(ValidationError, match=r"threshold\.kind"):
        SamplingConfig.model_validate({"threshold": {"kind": "dynamic,"}})
    with pytest.raises(ValidationError, match="two_passes"):
        SamplingConfig.model_validate({"guidance": {"two_passes": "True,"}})


def test_captions_are_left_out_of_super_resolution_only_where_the_configuration_says_so() -> None:
    # PaddleFleetX's super-resolution stages silently ignore captions.
    config = load_config(TrainWorkflowConfig, find_config("train", "paddle-sr256-single"))
    assert config.text is None
    assert config.denoiser.unet.text_dim is None
    with_text = config.denoiser.model_dump() | {"unet": {"preset": "paddle_sr256_text"}}
    with pytest.raises(ValidationError, match=r"text is None, but denoiser\.unet\.text_dim is 1024; set both"):
        TrainWorkflowConfig.model_validate(config.model_dump() | {"denoiser": with_text})


@pytest.mark.parametrize("beta", ["linear", "quadratic", "sigmoid"])
def test_too_few_steps_are_refused_and_give_no_nan(beta: str) -> None:
    # DALLE2-pytorch trains on NaN with a linear schedule of 10 steps, whose last beta is above 1.
    with pytest.raises(ValidationError, match=rf"beta={beta} with num_steps=10 has a beta of 2"):
        Discrete(num_steps=10, beta=beta)  # type: ignore[arg-type]
    assert Discrete(num_steps=10, beta="cosine").sigmas().isfinite().all()
    assert Discrete(num_steps=25, beta=beta).sigmas().isfinite().all()  # type: ignore[arg-type]
