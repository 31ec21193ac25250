"""The diffusion and the sampling of DeepFloyd IF's pipelines, from diffusers' schedulers and back to them."""

import importlib
from typing import Any

import pytest
import torch

from imagen_core.cascade import SamplingConfig
from imagen_core.conversion.deepfloyd import (
    denoiser_config,
    noising_settings,
    not_expressible,
    published_sampling,
    sampling,
    scheduler_settings,
)
from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.diffusion.schedules import Discrete
from imagen_core.models import Conditioning
from imagen_core.models.presets.unets import PRESETS
from tests.diffusers_layout import NOISING, SCHEDULERS, SIZES, TEXT_DIM, UNETS

RESCALED = {"kind": "discrete", "rescale_steps": True}


def configs() -> dict[int, DenoiserConfig]:
    return {
        1: denoiser_config(UNETS[1], SCHEDULERS[1]),
        2: denoiser_config(UNETS[2], SCHEDULERS[2], NOISING, SIZES[1]),
    }


def test_a_stage_has_the_noise_levels_objective_and_learned_variance_of_its_pipeline() -> None:
    base, upsampler = configs().values()
    for config in (base, upsampler):
        assert config.diffusion.schedule.model_dump() == {"kind": "discrete", "num_steps": 1000, "beta": "cosine"}
        assert (config.diffusion.objective, config.diffusion.variance) == ("eps", "learned_range")
    assert (base.size_px, base.low_res_px, base.low_res_noise) == (SIZES[1], None, None)
    assert (upsampler.size_px, upsampler.low_res_px) == (SIZES[2], SIZES[1])
    assert upsampler.low_res_upsampling == "bilinear_corners"


def test_without_stage_1_its_images_have_a_fourth_of_the_side() -> None:
    assert denoiser_config(UNETS[2], SCHEDULERS[2], NOISING).low_res_px == SIZES[2] // 4


@pytest.mark.slow
def test_the_low_resolution_image_has_the_noise_and_the_label_of_step_250() -> None:
    scheduler = importlib.import_module("diffusers").DDPMScheduler(**{k: v for k, v in NOISING.items() if k[0] != "_"})
    denoiser = Denoiser(configs()[2])
    image, noise = torch.rand(2, 3, SIZES[2], SIZES[2]) * 2 - 1, torch.randn(2, 3, SIZES[2], SIZES[2])
    found = denoiser.with_sampling_low_res(Conditioning(text=torch.zeros(2, 1, TEXT_DIM)), image, noise)
    expected = scheduler.add_noise(image, noise, torch.tensor([250, 250]))
    assert found.low_res is not None
    assert found.low_res_noise is not None
    torch.testing.assert_close(found.low_res, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.low_res_noise, torch.full((2,), 250.0))


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_samples_as_its_pipeline_does_without_further_arguments(number: int) -> None:
    found = sampling(SCHEDULERS[number], low_res=number == 2)
    SamplingConfig.model_validate(found)
    assert found == published_sampling(low_res=number == 2)
    assert found == {
        "sampler": {"kind": "ancestral"},
        "grid": {"kind": "uniform", "spacing": "leading", "offset": 0},
        "num_steps": {1: 100, 2: 50}[number],
        "start": "unit_variance",
        "guidance": {"text": {1: 7.0, 2: 4.0}[number]},
        "threshold": {"kind": "dynamic", "percentile": 0.95, "cap": {1: 1.5, 2: 1.0}[number]},
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "ddpm, fixed variance, clipping": {"variance_type": "fixed_small", "thresholding": False, "clip_sample": True},
    "ddim, trailing": {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
    "ddim, offset": {"_class_name": "DDIMScheduler", "steps_offset": 1},
    "solver++": {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace"},
    "solver++, no threshold": {"_class_name": "DPMSolverMultistepScheduler", "thresholding": False},
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_scheduler_survives_the_way_back(name: str) -> None:
    scheduler = SCHEDULERS[1] | VARIANTS[name]
    session = sampling(scheduler, low_res=False)
    checked = SamplingConfig.model_validate(session).model_dump(mode="json")
    written = scheduler_settings(configs()[1], checked)
    assert sampling(written, low_res=False) == session
    compared = ("_class_name", "beta_schedule", "timestep_spacing", "thresholding", "prediction_type")
    assert {key: written[key] for key in compared} == {key: scheduler[key] for key in compared}


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_written_schedulers_are_read_by_diffusers_with_the_same_noise_levels(number: int) -> None:
    config = configs()[number]
    written = [scheduler_settings(config, published_sampling(low_res=number == 2))]
    written += [noising_settings(config)] if number == 2 else []
    for settings in written:
        theirs = importlib.import_module("diffusers").DDPMScheduler.from_config(settings)
        signal = theirs.alphas_cumprod.double()
        expected = ((1 - signal) / signal).sqrt()
        assert isinstance(config.diffusion.schedule, Discrete)
        torch.testing.assert_close(config.diffusion.schedule.sigmas(), expected, rtol=1e-3, atol=0)  # float32 there


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            {"_class_name": "LCMScheduler"},
            "LCMScheduler has no counterpart here; give the pipeline a DDPMScheduler or",
        ),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear' in 1000 steps has no counterpart"),
        ({"beta_schedule": "linear", "beta_end": 0.1}, "scheduler: beta_end is 0.1, but only 0.02 works here"),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction', but only 'epsilon' works here"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, but only False works here"),
        ({"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log', but only learned_range or"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one is False"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
            "solver_order is 3, but only 2 works here",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_a_scheduler_without_a_counterpart_is_refused_by_name(scheduler: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        both(SCHEDULERS[1] | scheduler)
    assert words in str(caught.value)


def both(scheduler: dict[str, Any]) -> None:
    denoiser_config(UNETS[1], scheduler)
    sampling(scheduler, low_res=False)


def test_stage_2_needs_the_scheduler_that_noises_its_low_resolution_images() -> None:
    with pytest.raises(ValueError, match="image_noising_scheduler is missing"):
        denoiser_config(UNETS[2], SCHEDULERS[2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": {"kind": "heun"}}, "sampler.kind is 'heun'"),
        ({"sampler": {"kind": "ddim"}}, "sampler.kept_noise is None, and only 'of_network' has a counterpart"),
        ({"grid": {"kind": "karras"}}, "grid.kind is 'karras', and only 'uniform'"),
        ({"grid": {"kind": "uniform", "skip_lowest": True}}, "grid.skip_lowest is True, and only False"),
        ({"start": "sigma"}, "start is None, and only 'unit_variance'"),
    ],
)
def test_a_session_that_no_scheduler_has_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    session = SamplingConfig.model_validate(published_sampling(low_res=False) | change).model_dump(mode="json")
    with pytest.raises(ValueError) as caught:
        scheduler_settings(configs()[1], session)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("number", "change", "words"),
    [
        (1, {"diffusion": {"schedule": {"kind": "log_snr_cosine"}, "objective": "eps"}}, "schedule is not discrete"),
        (1, {"diffusion": {"schedule": RESCALED, "objective": "eps"}}, "diffusion.schedule.rescale_steps is true"),
        (2, {"low_res_noise": {"kind": "uniform", "schedule": RESCALED}}, "low_res_noise.schedule.rescale_steps is"),
        (2, {"low_res_upsampling": "bicubic"}, "low_res_upsampling is 'bicubic'"),
        (2, {"low_res_noise": {"kind": "lognormal"}}, "low_res_noise is not uniform with a discrete schedule"),
        (1, {"unet": PRESETS["adm_64"].config.model_dump(), "size_px": 64}, "unet.pooling is 'attention'"),
    ],
    ids=["schedule", "steps", "steps of the noise", "upsampling", "noise", "network"],
)
def test_why_no_pipeline_has_a_stage_is_said(number: int, change: dict[str, Any], words: str) -> None:
    config = configs()[number]
    assert not_expressible(config) is None
    assert words in str(not_expressible(DenoiserConfig.model_validate(config.model_dump() | change)))


def test_a_stage_with_a_fixed_variance_or_another_objective_has_no_pipeline() -> None:
    config = configs()[1]
    for change in ({"objective": "v"}, {"variance": "fixed_small"}):
        diffusion = config.diffusion.model_dump() | change
        changed = DenoiserConfig.model_validate(config.model_dump() | {"diffusion": diffusion})
        assert "not eps, with a learned" in str(not_expressible(changed))
