"""imagen-pytorch's models, settings and weights, give the same outputs, losses and samples here."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.cascade import SamplingConfig
from imagen_core.conversion.imagen_pytorch import CascadeUnet, cascade_settings, cascade_unets
from imagen_core.conversion.imagen_pytorch_unet import unet_config, unet_weights
from imagen_core.diffusion import Denoiser, guided
from imagen_core.diffusion.loss import diffusion_loss
from imagen_core.models import Conditioning
from imagen_core.models.presets.unets import PRESETS
from imagen_core.samplers import sample
from imagen_core.samplers.base import History
from tests.imagen_core.conversion.imagen_pytorch.numbers import (
    LOW_RES_TIME,
    NEXT_TIME,
    SIGMAS,
    TEXT_DIM,
    TIMES,
    inputs,
)
from tests.imagen_core.conversion.minimagen.numbers import sampled, weights

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("expected.json").read_text())
OLD: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("expected-1.26.3.json").read_text())
EXPECTED |= {f"{case} of 1.26.3": expected for case, expected in OLD.items()}


def imported(case: str) -> tuple[CascadeUnet, Denoiser]:
    expected = EXPECTED[case]
    elucidated = expected["kind"] == "elucidated"
    settings = cascade_settings(expected["imagen"], elucidated=elucidated)
    text_dim = TEXT_DIM if settings["condition_on_text"] else None
    group_norm = any("groupnorm" in name for name in expected["shapes"])
    assert group_norm == case.endswith("1.26.3")
    (unet,) = cascade_unets(settings, elucidated=elucidated, text_dim=text_dim, group_norm=group_norm)
    denoiser = Denoiser(unet.config).eval()
    denoiser.net.load_state_dict(unet_weights(weights(expected["shapes"]), unet.config.unet))
    return unet, denoiser


def conditions(denoiser: Denoiser, given: dict[str, Tensor]) -> Conditioning:
    """Captions, and noisy low-resolution images at their level."""
    found = Conditioning()
    if denoiser.config.network.text_dim is not None:
        found = Conditioning(text=given["text"], text_mask=given["mask"])
    if not denoiser.config.network.low_res:
        return found
    time = torch.full((2,), LOW_RES_TIME, dtype=torch.float64)
    level = ((time + 0.008) / 1.008 * math.pi / 2).tan()
    if denoiser.config.low_res_noise.schedule.kind == "log_snr_linear":  # type: ignore[union-attr]
        level = torch.expm1(1e-4 + 10 * time**2).sqrt()
    return denoiser.with_low_res(found, given["low_res"], level, given["low_res_noise"])


def levels(denoiser: Denoiser, times: tuple[float, ...] = TIMES) -> Tensor:
    """Noise levels of times; its cosine schedule goes to a right angle, ours stops at a log-SNR of -20."""
    schedule = denoiser.config.diffusion.schedule
    if schedule.kind == "log_normal":
        return torch.tensor(SIGMAS, dtype=torch.float64)
    time = torch.tensor(times, dtype=torch.float64)
    return ((time + 0.008) / 1.008 * math.pi / 2).tan() if schedule.kind == "log_snr_cosine" else schedule.sigma(time)


def close(mine: Tensor, theirs: list[float], tolerance: float = 1e-5) -> None:
    expected = torch.tensor(theirs)
    torch.testing.assert_close(sampled(mine), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("case", EXPECTED)
def test_a_unet_of_imagen_pytorch_gives_the_same_here(case: str) -> None:
    _, denoiser = imported(case)
    given, sigma = inputs(EXPECTED[case]["imagen"]), levels(denoiser).float()
    x = given["x0"] + sigma[:, None, None, None] * given["noise"]
    conditioning = conditions(denoiser, given)
    if denoiser.config.network.self_conditioning:
        conditioning = replace(conditioning, estimate=given["estimate"])
    for what, keep in (("with_caption", True), ("without_caption", False)):
        kept = conditioning.with_keep("text", torch.full((2,), keep))
        with torch.no_grad():
            close(denoiser.network(x, sigma, kept)[0], EXPECTED[case][what], 1e-5)


@pytest.mark.parametrize("case", EXPECTED)
def test_the_loss_is_imagen_pytorchs(case: str) -> None:
    _, denoiser = imported(case)
    given, sigma = inputs(EXPECTED[case]["imagen"]), levels(denoiser)
    with torch.no_grad():
        loss = diffusion_loss(denoiser, given["x0"], sigma, given["noise"], conditions(denoiser, given)).mean()
    assert float(loss) == pytest.approx(EXPECTED[case]["loss"][0], rel=1e-5)


@pytest.mark.parametrize("case", [case for case in EXPECTED if "step" in EXPECTED[case]])
def test_a_step_of_sampling_is_imagen_pytorchs(case: str) -> None:
    unet, denoiser = imported(case)
    given, settings = inputs(EXPECTED[case]["imagen"]), SamplingConfig.model_validate(unet.sampling)
    sigma, sigma_next = levels(denoiser, (TIMES[1], NEXT_TIME)).float()
    denoise = guided(denoiser, conditions(denoiser, given), settings.guidance, settings.threshold)
    x = given["x0"] + sigma * given["noise"]
    with torch.no_grad():
        x = settings.sampler.step(denoise, x, sigma, sigma_next, lambda: given["step_noise"][0], History())
    close(x / (1 + sigma_next**2).sqrt(), EXPECTED[case]["step"], 1e-5)


class GivenNoise:
    """Noise of a list, one call after the other."""

    def __init__(self, noise: Tensor):
        self.left = list(noise)

    def __len__(self) -> int:
        return 2

    def normal(self, *_: Any) -> Tensor:
        return self.left.pop(0)


class Churned(GivenNoise):
    """imagen-pytorch takes noise in each step, here it is taken where there is churn."""

    def __init__(self, noise: Tensor, churns: list[bool]):
        super().__init__(torch.stack([noise[0], *(noise[1 + k] for k, churn in enumerate(churns) if churn)]))


@pytest.mark.parametrize("case", [case for case in EXPECTED if "sample" in EXPECTED[case]])
def test_an_elucidated_model_samples_the_same_images(case: str) -> None:
    unet, denoiser = imported(case)
    given, settings = inputs(EXPECTED[case]["imagen"]), SamplingConfig.model_validate(unet.sampling)
    sigmas = settings.grid.sigmas(unet.config.diffusion.schedule, settings.num_steps)
    sampler: Any = settings.sampler
    churns = [sampler.churn_sigma_min <= float(s) <= sampler.churn_sigma_max for s in sigmas[:-1]]
    assert len(set(churns)) == 2
    images = sample(
        settings.sampler,
        guided(denoiser, conditions(denoiser, given), settings.guidance, settings.threshold),
        sigmas,
        Churned(given["step_noise"], churns),
        unet.config.shape,
    )
    close(images.clamp(-1, 1), EXPECTED[case]["sample"], 1e-4)


@pytest.mark.parametrize("preset", ["imagen_pytorch_base", "imagen_pytorch_sr256", "imagen_pytorch_sr1024"])
def test_the_presets_are_imagen_pytorchs_settings(preset: str) -> None:
    theirs = PRESETS[preset].config
    low_res = preset != "imagen_pytorch_base"
    settings: dict[str, Any] = {"dim": 512, "dim_mults": (1, 2, 3, 4), "num_resnet_blocks": 3}
    settings |= dict.fromkeys(("layer_attns", "layer_cross_attns"), (False, True, True, True))
    if low_res:
        settings = {"dim": 128, "num_resnet_blocks": (2, 4, 8, 8), "memory_efficient": True}
        settings["layer_attns"] = (False, False, False, True) if preset == "imagen_pytorch_sr256" else False
        settings["layer_cross_attns"] = (False, False, False, True)
    settings |= {"attn_heads": 8, "attn_dim_head": 64}
    mine = unet_config(settings, text_dim=1024, channels=3, low_res=low_res, size_px=theirs.image_size_px)
    same = {"cond_dim": 512 if not low_res else None, "middle_cross_num_heads": None, "middle_cross_head_dim": None}
    dumped = mine.model_dump() | same | {"combine_at": "level"}
    depths = {"transformer_depth": (1,) * 4}
    assert dumped == theirs.model_dump() | depths


BASE = EXPECTED["base"]["imagen"]


def changed(**unet: Any) -> dict[str, Any]:
    return BASE | {"unets": [BASE["unets"][0] | unet]}


@pytest.mark.parametrize(
    ("imagen", "words"),
    [
        (BASE | {"p2_loss_weight_k": 1}, "p2_loss_weight_k: not a setting of imagen-pytorch 2.1.0's Imagen"),
        (BASE | {"video": True}, "video is true"),
        (BASE | {"image_sizes": [8, 16]}, "there are 1 unets for 2 image_sizes"),
        ({"image_sizes": [8]}, "unets must be a list"),
        (BASE | {"timesteps": [10, 20]}, "timesteps has 2 values for 1 unets"),
        (BASE | {"pred_objectives": "score"}, r"pred_objectives must be noise, x_start, v \(got 'score'\)"),
        (changed(depth=2), "unets.0: depth: not a setting of imagen-pytorch 2.1.0's Unet"),
        (changed(final_resnet_block=False), "final_resnet_block is False, but only True has a counterpart"),
        (changed(use_linear_attn=True), "use_linear_attn is True, but only False"),
        (changed(use_linear_cross_attn=[False, True]), "use_linear_cross_attn is"),
        (changed(ff_mult=4), "ff_mult is 4, but only 2"),
        (changed(cond_images_channels=3), "cond_images_channels is 3, but only 0"),
        (changed(resnet_groups=[4, 8]), r"resnet_groups is \[4, 8\], but only 8"),
        (changed(init_dim=16), "init_dim is 16, but only 8"),
        (changed(memory_efficient=True, use_global_context_attn=False), "use_global_context_attn is False"),
        (changed(final_conv_kernel_size=5), "out_kernel_size"),
    ],
)
def test_settings_without_a_counterpart_are_refused(imagen: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cascade_unets(cascade_settings(imagen, elucidated=False), elucidated=False, text_dim=TEXT_DIM)


def test_settings_of_layers_that_a_unet_lacks_do_not_matter() -> None:
    imagen = changed(use_linear_attn=True, layer_attns=True, attend_at_middle=False, ff_mult=4)
    (unet,) = cascade_unets(cascade_settings(imagen, elucidated=False), elucidated=False, text_dim=TEXT_DIM)
    assert unet.config.unet.model_dump()["ff_mult"] == 4


def test_nearest_upsampling_is_the_same_for_whole_factors_only() -> None:
    imagen = EXPECTED["super"]["imagen"] | {"image_sizes": [6, 8]}
    with pytest.raises(ValueError, match="8 px are no multiple of 6 px"):
        cascade_unets(cascade_settings(imagen, elucidated=False), elucidated=False, text_dim=TEXT_DIM)


def test_weights_of_other_settings_are_refused() -> None:
    config, state = imported("base")[0].config.unet, weights(EXPECTED["base"]["shapes"])
    with pytest.raises(ValueError, match=r"text_to_cond.weight has shape \(16, 24\), these settings make"):
        unet_weights(state, config.model_copy(update={"text_dim": 32}))
    with pytest.raises(ValueError, match="tensors are missing"):
        unet_weights({name: values for name, values in state.items() if "mid_block2" not in name}, config)
    with pytest.raises(ValueError, match="k_scale is missing"):
        unet_weights({name: values for name, values in state.items() if not name.endswith("k_scale")}, config)
