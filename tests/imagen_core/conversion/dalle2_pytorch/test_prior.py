"""DALLE2-pytorch's priors, settings and weights, give the same outputs, losses and samples here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.conversion.dalle2_prior import prior_config, prior_weights
from imagen_core.diffusion import Denoiser, Guidance, PriorConfig, guided
from imagen_core.diffusion.loss import diffusion_loss
from imagen_core.models import Conditioning
from imagen_core.models.presets.priors import PRIOR_PRESETS
from imagen_core.prior import PriorSamplingConfig
from imagen_core.samplers.base import History
from tests.imagen_core.conversion.dalle2_pytorch.numbers import DIM, STEPS, prior_inputs, weights

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("prior.json").read_text())


def imported(case: str) -> tuple[PriorConfig, PriorSamplingConfig, Denoiser]:
    config, sampling = prior_config(EXPECTED[case]["settings"])
    denoiser = Denoiser(config).eval()
    denoiser.net.load_state_dict(prior_weights(weights(EXPECTED[case]["shapes"]), config))
    return config, PriorSamplingConfig.model_validate(sampling), denoiser


def conditions(config: PriorConfig, given: dict[str, Tensor]) -> Conditioning:
    """Here captions' embeddings come at variance 1."""
    found = Conditioning(text_embed=given["text_embed"] * DIM**0.5)
    return found if config.network.text_dim is None else replace(found, text=given["text"], text_mask=given["mask"])


def levels(config: PriorConfig) -> Tensor:
    return config.diffusion.schedule.sigmas()[list(STEPS)]  # type: ignore[union-attr]


def close(mine: Tensor, theirs: list[float]) -> None:
    expected = torch.tensor(theirs).reshape(mine.shape)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("case", EXPECTED)
def test_a_prior_of_dalle2_pytorch_gives_the_same_here(case: str) -> None:
    config, _, denoiser = imported(case)
    given, conditioning = prior_inputs(), conditions(config, prior_inputs())
    if config.network.self_conditioning:
        conditioning = replace(conditioning, estimate=given["estimate"])
    dropped = torch.zeros(2, dtype=torch.bool)
    sigma = levels(config).float()
    x = config.to_length(given["x0"]) + sigma[:, None] * given["noise"]
    for what, conditioned in (
        ("with_caption", conditioning),
        ("without_caption", replace(conditioning, text_keep=dropped)),
        ("without_embedding", replace(conditioning, image_embed_keep=dropped)),
    ):
        with torch.no_grad():
            output = denoiser.net(x / (1 + sigma**2).sqrt()[:, None], torch.tensor(STEPS).float(), conditioned)
        close(output, EXPECTED[case][what])


@pytest.mark.parametrize("version", [(1, 0, 1), (1, 8, 4), (1, 9, 0)])
def test_a_prior_of_an_earlier_version_gives_the_same_here(version: tuple[int, ...]) -> None:
    name = f"prior-{'.'.join(map(str, version))}.json"
    expected, given = json.loads(Path(__file__).with_name(name).read_text()), prior_inputs()
    config, _ = prior_config(expected["settings"], version)
    denoiser = Denoiser(config).eval()
    denoiser.net.load_state_dict(prior_weights(weights(expected["shapes"]), config, version))
    sigma = levels(config).float()
    with torch.no_grad():
        x = given["x0"] + sigma[:, None] * given["noise"]
        close(denoiser.network(x, sigma, conditions(config, given))[0], expected["with_caption"])


@pytest.mark.parametrize(
    ("settings", "version", "words"),
    [
        ({}, (0, 26, 2), r"a prior of version 0\.26\.2 of DALLE2-pytorch computes something else than since 1\.0"),
        ({"num_timesteps": None}, (1, 10, 7), "net.num_timesteps: null of version 1.10.7"),
        ({"self_cond": True}, (1, 12, 0), "net.self_cond of version 1.12.0"),
    ],
)
def test_what_earlier_versions_computed_otherwise_is_refused(
    settings: dict[str, Any], version: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        prior_config(changed(**settings), version)


@pytest.mark.parametrize("case", EXPECTED)
def test_the_loss_is_dalle2_pytorchs(case: str) -> None:
    config, _, denoiser = imported(case)
    given = prior_inputs()
    with torch.no_grad():
        loss = diffusion_loss(
            denoiser, config.to_length(given["x0"]), levels(config), given["noise"], conditions(config, given)
        )
    assert float(loss.mean()) == pytest.approx(EXPECTED[case]["loss"][0], rel=1e-5)


@pytest.mark.parametrize("case", EXPECTED)
def test_a_step_of_sampling_is_dalle2_pytorchs(case: str) -> None:
    config, sampling, denoiser = imported(case)
    given, table = prior_inputs(), config.diffusion.schedule.sigmas()  # type: ignore[union-attr]
    sigma, sigma_next = table[STEPS[1]].float(), table[STEPS[1] - 1].float()
    denoise = guided(denoiser, conditions(config, given), Guidance(), sampling.threshold)
    x = config.to_length(given["x0"]) + sigma * given["noise"]
    with torch.no_grad():
        x = sampling.sampler.step(denoise, x, sigma, sigma_next, lambda: given["step_noise"], History())
    close(x / (1 + sigma_next**2).sqrt(), EXPECTED[case]["step"])


STEPS_PRIOR = EXPECTED["steps"]["settings"]
LAION = {
    "clip": {"make": "openai", "model": "ViT-L/14"},
    "net": {
        "dim": 768,
        "depth": 24,
        "num_timesteps": 1000,
        "max_text_len": 256,
        "dim_head": 64,
        "heads": 32,
        "ff_mult": 4,
        "attn_dropout": 0.05,
        "ff_dropout": 0.05,
        "normformer": True,
    },
    "image_embed_dim": 768,
    "image_size": 224,
    "timesteps": 1000,
    "cond_drop_prob": 0.1,
    "loss_type": "l2",
}


def test_the_preset_is_a_large_priors_network_but_for_what_only_imports_have() -> None:
    network = prior_config(LAION)[0].network
    mine = network.model_dump()
    differing = {"unit_text_embed", "sinusoids", "null_position", "stable_norm_out", "dropout"}
    theirs = PRIOR_PRESETS["dalle2_prior_large"].config.model_dump()
    assert {name for name in mine if mine[name] != theirs[name]} == differing
    with torch.device("meta"):
        assert sum(p.numel() for p in network.build().parameters()) == 249_416_720


def test_it_samples_ancestrally_in_all_steps_or_by_ddim_in_fewer() -> None:
    _, sampling = prior_config(STEPS_PRIOR)
    assert sampling["sampler"] == {"kind": "ancestral"}
    assert sampling["num_steps"] == 20
    _, sampling = prior_config(STEPS_PRIOR | {"sample_timesteps": 5, "init_image_embed_l2norm": True})
    assert sampling["sampler"] == {"kind": "ddim", "eta": 1.0}
    assert sampling["num_steps"] == 5
    assert sampling["start_at_length"]
    assert sampling["num_candidates"] == 2


def changed(**net: Any) -> dict[str, Any]:
    return STEPS_PRIOR | {"net": STEPS_PRIOR["net"] | net}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (changed(norm_in=True), "net.norm_in is True"),
        (changed(layers=3), "net.layers: not a setting of DALLE2-pytorch 1.15.6's prior"),
        (changed(num_timesteps=30), "network.num_timesteps is 30, but diffusion.schedule has 20 steps"),
        (STEPS_PRIOR | {"eta": 1}, "eta: not a setting"),
        (STEPS_PRIOR | {"predict_x_start": False}, "predict_x_start is False"),
        (STEPS_PRIOR | {"training_clamp_l2norm": True}, "set sampling_clamp_l2norm to true"),
        (STEPS_PRIOR | {"image_embed_dim": 32}, "image_embed_dim is 32, but net.dim is 16"),
        (
            STEPS_PRIOR | {"init_image_embed_l2norm": True, "image_embed_scale": 1.0},
            "init_image_embed_l2norm has no counterpart here with an image_embed_scale of 1.0",
        ),
        ({"unets": []}, "net must have dim and depth"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prior_config(settings)


def test_weights_of_other_settings_are_refused() -> None:
    state, config = weights(EXPECTED["steps"]["shapes"]), prior_config(STEPS_PRIOR)[0]
    with pytest.raises(ValueError, match=r"learned_query has shape \(16,\), these settings make shape \(24,\)"):
        prior_weights(state, prior_config(changed(dim=24))[0])
    with pytest.raises(ValueError, match="tensors are missing"):
        prior_weights({name: values for name, values in state.items() if "layers.1" not in name}, config)
