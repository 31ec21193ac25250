"""A cascade samples the images that DeepFloyd IF's pipelines of diffusers do from the same noise, to 1e-4.

The networks are diffusers' own, tiny and random, so that only the sampling is compared: noise levels, steps, guidance
with an empty caption, learned variance, thresholding, and the noise on the low-resolution image.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import imagen_core.cascade
from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.models import Conditioning
from tests.deepfloyd import DYNAMIC, LARGE, SCHEDULE, SMALL, STATIC, SameNoise, generators, network, pipeline

DIM, TOKENS, SEEDS = 8, 77, (3, 4)
FAST27 = [*(999, 800, 799, 600, 599, 500, 400), *(399, 377, 355, 333, 311, 288, 266, 244, 222, 200)]
FAST27 += [199, 177, 155, 133, 111, 88, 66, 44, 22, 0]


class Theirs(nn.Module):
    """diffusers' network behind the interface of ours."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.text_mask is not None
        assert bool(conditioning.text_mask.all())
        x = x if conditioning.low_res is None else torch.cat([x, conditioning.low_res], dim=1)
        return self.unet(x, c_noise, conditioning.text, class_labels=conditioning.low_res_noise).sample


def stage(unet: nn.Module, sampling: dict[str, Any], *, low_res: bool) -> CascadeStage:
    """The same network as a stage of ours."""
    schedule = {"kind": "discrete", "beta": "cosine"}
    ours = {"family": "regular", "image_size_px": SMALL, "embed_dim": 32, "channel_mult": [1], "num_res_blocks": 1}
    ours |= {"attention_resolutions": [SMALL], "head_dim": 16, "text_dim": DIM, "cond_dim": DIM, "out_channels": 6}
    config: dict[str, Any] = {
        "unet": ours,
        "size_px": SMALL,
        "diffusion": {"schedule": schedule, "objective": "eps", "variance": "learned_range"},
    }
    if low_res:
        config["unet"] = ours | {"image_size_px": LARGE, "low_res": True, "low_res_noise": True}
        config |= {"size_px": LARGE, "low_res_px": SMALL, "low_res_upsampling": "bilinear_corners"}
        config["low_res_noise"] = {"kind": "uniform", "schedule": schedule, "sample_time": 0.2505}
    denoiser = Denoiser(DenoiserConfig.model_validate(config))
    denoiser.net = Theirs(unet)
    sampling = {"start": "unit_variance", "guidance": {"text": 4.0 if low_res else 7.0}} | sampling
    return CascadeStage(denoiser, SamplingConfig.model_validate(sampling))


@pytest.fixture
def captions() -> tuple[Tensor, Tensor]:
    """One for each image, (2, TOKENS, DIM), and the empty one, (TOKENS, DIM)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, TOKENS, DIM, generator=generator), torch.randn(TOKENS, DIM, generator=generator)


def theirs(schedulers: Sequence[Any], captions: tuple[Tensor, Tensor], **options: Any) -> dict[int, Tensor]:
    """What diffusers samples in both stages, in [-1, 1]."""
    text, empty = captions
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": empty.expand(2, -1, -1), "output_type": "pt"}
    first, second = (
        pipeline(network(DIM, low_res=bool(number)), scheduler) for number, scheduler in enumerate(schedulers)
    )
    small = first(**embeds, generator=generators(SEEDS, 0), **options).images
    large = second(**embeds, image=small, generator=generators(SEEDS, 1), **options).images
    return {SMALL: small, LARGE: large}


def ours(sampling: Sequence[dict[str, Any]], captions: tuple[Tensor, Tensor]) -> dict[int, Tensor]:
    """What our cascade samples."""
    stages = [stage(network(DIM, low_res=bool(n)), each, low_res=bool(n)) for n, each in enumerate(sampling)]
    text, empty = captions
    return Cascade(stages, {"name": "t5", "dim": DIM}).sample(list(text), SEEDS, null_text=empty)


@pytest.fixture(autouse=True)
def _same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagen_core.cascade, "SeededNoise", SameNoise)


def assert_same(mine: dict[int, Tensor], other: dict[int, Tensor]) -> None:
    for size in (SMALL, LARGE):
        assert float(other[size].std()) > 0.05, "or the comparison would show nothing"
        torch.testing.assert_close(mine[size], other[size].clamp(-1, 1), rtol=0, atol=1e-4)


def scheduler(name: str, **settings: Any) -> Any:
    return getattr(importlib.import_module("diffusers"), name)(**SCHEDULE, **settings)


LEARNED = {"variance_type": "learned_range"}
TEN = {"num_inference_steps": 10}
CLIPPED = tuple({"kind": "dynamic", "percentile": 0.95, "cap": cap} for cap in (1.5, 1.0))
NOT_CLIPPED = ({"kind": "none"}, {"kind": "none"})


def uniform(num_steps: int, **settings: Any) -> dict[str, Any]:
    return {"grid": {"kind": "uniform"} | settings, "num_steps": num_steps}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "options", "sampling", "thresholds"),
    [
        (
            "DDPMScheduler",
            LEARNED,
            TEN,
            {"sampler": {"kind": "ancestral"}, **uniform(10, spacing="leading")},
            CLIPPED,
        ),
        (
            "DDPMScheduler",
            LEARNED,
            {"timesteps": FAST27},
            {"sampler": {"kind": "ancestral"}, "grid": {"kind": "listed", "steps": FAST27}, "num_steps": 27},
            CLIPPED,
        ),
        (
            "DDIMScheduler",
            {},
            TEN,
            {"sampler": {"kind": "ddim", "kept_noise": "of_network"}, **uniform(10, spacing="leading")},
            CLIPPED,
        ),
        (
            "DDIMScheduler",
            {"steps_offset": 1},
            TEN | {"eta": 0.5},
            {
                "sampler": {"kind": "ddim", "eta": 0.5, "kept_noise": "of_network"},
                **uniform(10, spacing="leading", offset=1),
            },
            CLIPPED,
        ),
        (
            "DPMSolverMultistepScheduler",
            LEARNED,
            TEN,
            {"sampler": {"kind": "dpmpp_2m"}, **uniform(10, skip_lowest=True)},
            CLIPPED,
        ),
        (
            "DPMSolverMultistepScheduler",
            LEARNED | {"timestep_spacing": "trailing"},
            TEN,
            {"sampler": {"kind": "dpmpp_2m"}, **uniform(10, spacing="trailing")},
            CLIPPED,
        ),
        (
            "PNDMScheduler",
            {"skip_prk_steps": True, "set_alpha_to_one": True},
            TEN,
            {"sampler": {"kind": "plms"}, **uniform(10, spacing="leading")},
            NOT_CLIPPED,
        ),
    ],
    ids=["ddpm", "ddpm fast27", "ddim", "ddim eta 0.5", "dpm-solver++", "dpm-solver++ trailing", "pndm"],
)
def test_both_stages_sample_the_images_of_diffusers(name, settings, options, sampling, thresholds, captions) -> None:
    more = (DYNAMIC, STATIC) if thresholds is CLIPPED else ({}, {})
    schedulers = [scheduler(name, **settings, **threshold) for threshold in more]
    for each in schedulers:
        if "variance_type" not in each.config:  # it is where one is made from the configuration of another
            each.register_to_config(variance_type="fixed_small")
    mine = ours([sampling | {"threshold": threshold} for threshold in thresholds], captions)
    assert_same(mine, theirs(schedulers, captions, **options))


@pytest.mark.slow
def test_stage_one_samples_the_images_of_diffusers_euler_steps(captions) -> None:
    """Not stage II, whose low-resolution image diffusers scales together with the noisy one."""
    schedulers = [scheduler("EulerDiscreteScheduler", timestep_spacing="leading") for _ in range(2)]
    for each in schedulers:
        each.register_to_config(variance_type="fixed_small")
    sampling = {"sampler": {"kind": "euler"}, **uniform(6, spacing="leading"), "threshold": {"kind": "none"}}
    other = theirs(schedulers, captions, num_inference_steps=6)[SMALL]
    torch.testing.assert_close(ours([sampling] * 2, captions)[SMALL], other.clamp(-1, 1), rtol=0, atol=1e-4)


def test_the_captions_and_the_empty_one_matter_to_these_networks(captions) -> None:
    sampling = [{"sampler": {"kind": "ancestral"}, **uniform(3), "threshold": each} for each in CLIPPED]
    text, empty = captions
    images = ours(sampling, captions)
    for other in ((text.flip(0), empty), (text, -empty)):
        changed = ours(sampling, other)
        for size in (SMALL, LARGE):
            assert float((changed[size] - images[size]).abs().max()) > 0.05
