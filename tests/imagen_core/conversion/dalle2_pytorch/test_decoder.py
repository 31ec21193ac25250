"""DALLE2-pytorch's decoders, settings and weights, give the same outputs, losses and samples here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.cascade import SamplingConfig
from imagen_core.conversion.dalle2_decoder import DecoderUnet, decoder_unets
from imagen_core.conversion.dalle2_unet import unet_config, unet_weights
from imagen_core.diffusion import Denoiser, Guidance, Threshold, guided
from imagen_core.diffusion.loss import diffusion_loss
from imagen_core.models import Conditioning
from imagen_core.models.presets.unets import PRESETS
from imagen_core.samplers.base import History
from tests.imagen_core.conversion.dalle2_pytorch.numbers import DIM, STEPS, decoder_inputs, weights
from tests.imagen_core.conversion.minimagen.numbers import sampled

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("decoder.json").read_text())


def imported(case: str) -> tuple[DecoderUnet, Denoiser]:
    unet = decoder_unets(EXPECTED[case]["settings"])[-1]
    denoiser = Denoiser(unet.config).eval()
    state = unet_weights(weights(EXPECTED[case]["shapes"]), unet.config.unet, constrained=unet.constrained)
    denoiser.net.load_state_dict(state)
    return unet, denoiser


def conditions(denoiser: Denoiser, given: dict[str, Tensor]) -> Conditioning:
    """Here images' embeddings come at variance 1."""
    network, found = denoiser.config.network, Conditioning()
    if network.image_embed_dim is not None:
        found = replace(found, image_embed=given["image_embed"] * DIM**0.5)
    if network.text_dim is not None:
        found = replace(found, text=given["text"], text_mask=given["mask"])
    if not network.low_res:
        return found
    return denoiser.with_low_res(found, given["low_res"], torch.zeros(2), given["noise"])


def levels(denoiser: Denoiser) -> Tensor:
    return denoiser.config.diffusion.schedule.sigmas()[list(STEPS)]  # type: ignore[union-attr]


def close(mine: Tensor, theirs: list[float], tolerance: float = 1e-5) -> None:
    expected = torch.tensor(theirs)
    torch.testing.assert_close(sampled(mine), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("case", EXPECTED)
def test_a_unet_of_dalle2_pytorch_gives_the_same_here(case: str) -> None:
    unet, denoiser = imported(case)
    given = decoder_inputs()
    conditioning = conditions(denoiser, given)
    if denoiser.config.network.self_conditioning:
        conditioning = replace(conditioning, estimate=given["estimate"])
    dropped = torch.zeros(2, dtype=torch.bool)
    sigma = levels(denoiser).float()[:, None, None, None]
    x = (given["x0"] + sigma * given["noise"]) / (1 + sigma**2).sqrt()
    for what, conditioned in (
        ("with_caption", conditioning),
        ("without_caption", replace(conditioning, text_keep=dropped)),
        ("without_embedding", replace(conditioning, image_embed_keep=dropped)),
    ):
        with torch.no_grad():
            output = denoiser.net(x, torch.tensor(STEPS).float(), conditioned)
        if unet.constrained:  # the share of the larger variance is in other units
            output[:, 3:] = 2 * output[:, 3:] - 1
        close(output, EXPECTED[case][what])


@pytest.mark.parametrize("case", EXPECTED)
def test_the_loss_is_dalle2_pytorchs(case: str) -> None:
    _, denoiser = imported(case)
    given = decoder_inputs()
    with torch.no_grad():
        loss = diffusion_loss(denoiser, given["x0"], levels(denoiser), given["noise"], conditions(denoiser, given))
    assert float(loss.mean()) == pytest.approx(EXPECTED[case]["loss"][0], rel=1e-5)


@pytest.mark.parametrize("case", EXPECTED)
def test_a_step_of_sampling_is_dalle2_pytorchs(case: str) -> None:
    unet, denoiser = imported(case)
    given, settings = decoder_inputs(), SamplingConfig.model_validate(unet.sampling)
    table = denoiser.config.diffusion.schedule.sigmas()  # type: ignore[union-attr]
    sigma, sigma_next = table[STEPS[1]].float(), table[STEPS[1] - 1].float()
    denoise = guided(denoiser, conditions(denoiser, given), settings.guidance, settings.threshold)
    x = given["x0"] + sigma * given["noise"]
    with torch.no_grad():
        x = settings.sampler.step(denoise, x, sigma, sigma_next, lambda: given["step_noise"], History())
    close(x / (1 + sigma_next**2).sqrt(), EXPECTED[case]["step"])


def test_guidance_by_both_conditions_with_one_weight_is_its_cond_scale() -> None:
    _, denoiser = imported("base")
    given, sigma = decoder_inputs(), levels(denoiser).float()[0]
    conditioning, x = conditions(denoiser, given), given["x0"] + sigma * given["noise"]
    guidance, none = Guidance(text=3.0, image_embed=3.0), torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        mine = guided(denoiser, conditioning, guidance, Threshold(kind="none"))(x, sigma)
        full = denoiser(x, sigma.expand(2), conditioning)
        dropped = denoiser(x, sigma.expand(2), replace(conditioning, text_keep=none, image_embed_keep=none))
    torch.testing.assert_close(mine, dropped + 3 * (full - dropped), rtol=1e-5, atol=1e-5)


def test_defaults_by_unet_are_dalle2_pytorchs() -> None:
    base, larger = decoder_unets(EXPECTED["super"]["settings"])
    assert base.config.diffusion.variance == "learned_range"
    assert larger.config.diffusion.variance == "fixed_small"
    assert [unet.config.diffusion.schedule.beta for unet in (base, larger)] == ["cosine", "linear"]  # type: ignore[union-attr]
    assert base.config.diffusion.vb_weight == pytest.approx(0.001 / 40)
    assert base.sampling["sampler"] == {"kind": "ancestral"}
    few = decoder_unets(EXPECTED["super"]["settings"] | {"sample_timesteps": [5, 40], "ddim_sampling_eta": 0.5})
    assert few[0].sampling["sampler"] == {"kind": "ddim", "eta": 0.5}
    assert [unet.sampling["num_steps"] for unet in few] == [5, 40]
    assert few[1].sampling["sampler"] == {"kind": "ancestral"}


@pytest.mark.parametrize("preset", ["dalle2_decoder", "dalle2_decoder_text", "dalle2_decoder_sr"])
def test_the_presets_are_dalle2_pytorchs_settings_but_for_what_only_imports_have(preset: str) -> None:
    theirs: Any = PRESETS[preset].config
    settings = {"dim": theirs.dim, "dim_mults": theirs.dim_mults, "cond_dim": theirs.cond_dim}
    mine = unet_config(
        settings | {"image_embed_dim": theirs.image_embed_dim, "text_embed_dim": theirs.text_dim},
        channels=3,
        learned_variance=False,
        low_res=theirs.low_res,
        reads_image_embed=True,
        reads_text=theirs.text_dim is not None,
        size_px=theirs.image_size_px,
    ).model_dump()
    differing = {name for name in mine if mine[name] != theirs.model_dump()[name]}
    assert differing == {"sinusoids", "level_activation"}


BASE = EXPECTED["base"]["settings"]


def changed(**unet: Any) -> dict[str, Any]:
    return BASE | {"unets": [BASE["unets"][0] | unet]}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (changed(depth=2), "unets.0: depth: not a setting of DALLE2-pytorch 1.15.6's Unet"),
        (changed(sparse_attn=True), "sparse_attn is True, but only False has a counterpart here"),
        (changed(cosine_sim_cross_attn=True), "cosine_sim_cross_attn is True"),
        (changed(combine_upsample_fmaps=True), "combine_upsample_fmaps is True"),
        (changed(resnet_groups=4), "resnet_groups is 4, but only 8"),
        (changed(add_image_embeds_to_time=False), "add_image_embeds_to_time is False"),
        (changed(cond_dim=DIM), "image_embed_dim is 16, as cond_dim is"),
        (changed(image_embed_dim=None), "image_embed_dim is missing"),
        (BASE | {"vae": {}}, "vae: not a setting of DALLE2-pytorch 1.15.6's decoder known here"),
        (BASE | {"unets": []}, "unets must be a list"),
        (BASE | {"image_size": None}, "image_sizes must rise and have an entry for each of the 1 unets"),
        (EXPECTED["super"]["settings"] | {"image_sizes": [6, 8]}, "8 px are no multiple of 6 px"),
        (EXPECTED["super"]["settings"] | {"use_noise_for_lowres_cond": [True]}, "use_noise_for_lowres_cond is"),
        (EXPECTED["super"]["settings"] | {"predict_v": [True]}, "predict_v has 1 values for 2 unets"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoder_unets(settings)


def test_decoders_of_earlier_versions_are_refused() -> None:
    assert decoder_unets(BASE, (1, 10, 0))
    with pytest.raises(ValueError, match=r"a decoder of version 1\.9\.0 of DALLE2-pytorch computes something else"):
        decoder_unets(BASE, (1, 9, 0))
    with pytest.raises(ValueError, match=r"predict_v of version 1\.11\.0"):
        decoder_unets(EXPECTED["super"]["settings"], (1, 11, 0))


def test_weights_of_other_settings_are_refused() -> None:
    state, config = weights(EXPECTED["base"]["shapes"]), decoder_unets(BASE)[0].config.unet
    other: Any = decoder_unets(changed(cond_dim=24))[0].config.unet
    with pytest.raises(ValueError, match=r"these settings make shape"):
        unet_weights(state, other)
    with pytest.raises(ValueError, match="tensors are missing"):
        unet_weights({name: values for name, values in state.items() if "mid_block2" not in name}, config)
