"""The table of a stage's sampler gives the images that the sampler itself does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.cascade import CascadeStage
from imagen_core.diffusion.guidance import Denoise, GuidedDenoiser
from imagen_core.samplers import SeededNoise, sample
from imagen_core.samplers.base import History, SampleNoise, Sampler
from stages.sampling.diffusers.steps import sampling_table
from tests.stages.sampling.diffusers.models import DISCRETE, REGULAR, stage

SAMPLERS: list[dict[str, Any]] = [
    {"kind": "dpmpp_2m"},
    {"kind": "ddim"},
    {"kind": "ddim", "eta": 0.5},
    {"kind": "ddim", "eta": 0.5, "kept_noise": "of_network"},
    {"kind": "euler", "churn": 0.2, "churn_sigma_max": 5.0},
    {"kind": "heun"},
    {"kind": "plms", "ddim_first_steps": 1},
    {"kind": "prk", "num_steps": 3},
    {"kind": "ancestral"},
    {"kind": "ancestral", "variance": "fixed_large"},
]


def follow(table: list[dict[str, Any]], denoise: Any, noise: SeededNoise, share: Any) -> Tensor:
    """An independent implementation, from the description of the table."""
    at: dict[str, Tensor] = {}
    said: dict[str, Tensor] = {}
    for entry in table:
        if "noise" in entry:
            at[entry["noise"]] = noise.normal((3, 4, 4), dtype=torch.float64)
        else:
            varied = entry.get("variance")
            total = torch.zeros(len(noise), 3, 4, 4, dtype=torch.float64)
            for name, number in entry["of"].items():
                term = number * at[name]
                if varied is not None and varied["noise"] == name:
                    term = term * torch.exp(varied["log_ratio"] * share(said[varied["channels"]]))
                total += term
            if "estimate" in entry:
                before, said[entry["estimate"]] = denoise(total, torch.tensor(entry["sigma"]).double())
                at[entry["estimate"]] = clip(before)
                if "unclipped" in entry:
                    at[entry["unclipped"]] = before
            else:
                at[entry["image"]] = total
    return at[table[-1]["image"]]


def with_variance(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return (x / (1 + sigma**2).sqrt()).tanh(), (3 * x / (1 + sigma)).sin()


def clip(estimate: Tensor) -> Tensor:
    return estimate.clamp(-0.7, 0.7)


def both(of: CascadeStage, share: Any = None) -> tuple[Tensor, Tensor]:
    diffusion, settings = of.config.diffusion, of.sampling
    sigmas = settings.grid.sigmas(diffusion.schedule, settings.num_steps)
    denoise = GuidedDenoiser(with_variance, diffusion, clip)
    shape, noise = (3, 4, 4), SeededNoise([0, 1])
    options = {"dtype": torch.float64, "start": settings.start, "schedule": diffusion.schedule}
    expected = sample(settings.sampler, denoise, sigmas, noise, shape, **options)
    return follow(sampling_table(of), with_variance, SeededNoise([0, 1]), share), expected


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_table_of_each_sampler_gives_its_images(sampler: dict[str, Any]) -> None:
    found, expected = both(stage(REGULAR, {"sampler": sampler, "num_steps": 9}))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["sigma", "unit_variance"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_table_of_a_flow_gives_its_images(sampler: dict[str, Any], start: str) -> None:
    diffusion = {"schedule": {"kind": "flow", "shift": 2.0, "noise_scale": 2.0}, "objective": "velocity"}
    sampling = {"sampler": sampler, "num_steps": 9, "grid": {"kind": "uniform"}, "start": start}
    found, expected = both(stage(REGULAR, sampling, diffusion=diffusion))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_size_of_the_first_noise_is_in_the_table() -> None:
    sampling = {"start": "unit_variance", "num_steps": 3, "grid": {"kind": "karras", "sigma_max": 2.0}}
    of = stage(REGULAR, sampling)
    found, expected = both(of)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    first = next(entry["of"] for entry in sampling_table(of) if "estimate" in entry)
    assert list(first.values()) == pytest.approx([5**0.5])


def test_only_a_sampler_that_reads_them_has_estimates_before_the_threshold() -> None:
    def names(sampler: dict[str, Any]) -> set[str]:
        return {name for entry in sampling_table(stage(REGULAR, {"sampler": sampler})) for name in entry}

    assert "unclipped" in names({"kind": "ddim", "kept_noise": "of_network"})
    assert "unclipped" not in names({"kind": "ddim"})


@pytest.mark.parametrize("variance", ["learned", "learned_range", "learned_range_sigmoid"])
def test_the_table_of_a_learned_variance_gives_its_images(variance: str) -> None:
    sampling = {"sampler": {"kind": "ancestral"}, "grid": {"kind": "uniform"}, "num_steps": 50}
    of = stage(REGULAR | {"out_channels": 6}, sampling, diffusion=DISCRETE | {"variance": variance})
    found, expected = both(of, torch.sigmoid if variance.endswith("sigmoid") else lambda channels: channels)
    assert any("variance" in entry for entry in sampling_table(of))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_guidance_within_an_interval_is_in_the_table() -> None:
    of = stage(REGULAR, {"guidance": {"text": 3, "after_sigma": 10, "until_sigma": 0.1}, "num_steps": 9})
    entries = [entry for entry in sampling_table(of) if "estimate" in entry]
    assert [entry["guided"] for entry in entries] == [0.1 <= entry["sigma"] <= 10 for entry in entries]
    assert {entry["guided"] for entry in entries} == {True, False}


class Squared(Sampler):
    """No sum of images."""

    kind: str = "squared"

    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        return denoise(x, sigma) ** 2


def test_a_sampler_that_does_more_than_adding_up_is_refused() -> None:
    of = stage(REGULAR)
    squared = CascadeStage(of.denoiser, of.sampling.model_copy(update={"sampler": Squared()}))
    with pytest.raises(ValueError, match=r"sampler squared: its steps are no sums"):
        sampling_table(squared)
