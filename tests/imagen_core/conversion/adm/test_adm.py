"""Models of guided-diffusion, improved-diffusion and nostalgebraist's fork, settings and weights, give the same
outputs, losses and steps here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.cascade import SamplingConfig
from imagen_core.conversion import nostalgebraist
from imagen_core.conversion.adm import denoiser_config, sampling, settings_of_flags
from imagen_core.conversion.adm_unet import unet_weights
from imagen_core.diffusion import Denoiser, guided
from imagen_core.diffusion.loss import diffusion_loss
from imagen_core.diffusion.schedules import Discrete
from imagen_core.models import Conditioning
from imagen_core.models.presets.unets import PRESETS
from imagen_core.models.unet.regular import RegularUNetConfig
from imagen_core.samplers import Ancestral, Ddim
from imagen_core.samplers.base import History
from stages.checkpoints.import_adm import parse_flags
from tests.imagen_core.conversion.adm.numbers import STEP, inputs, sampled
from tests.imagen_core.conversion.minimagen.numbers import weights
from tests.imagen_core.models.count import build_on_meta

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("expected.json").read_text())
CASES, PUBLISHED = EXPECTED["cases"], EXPECTED["published"]
EACH_CASE = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "512" in case else ()) for case in CASES]
)


def settings_of(text: str) -> tuple[dict[str, Any], bool]:
    flags = dict(parse_flags(text))
    return settings_of_flags(flags, low_res="large_size" in flags), "large_size" in flags


def imported(case: str) -> tuple[dict[str, Any], Denoiser, dict[str, Tensor], Conditioning]:
    expected = CASES[case]
    if "config" in expected:
        low_res = expected["config"]["is_super_res"]
        settings = nostalgebraist.settings_of_config(expected["config"], low_res=low_res)
        config = nostalgebraist.denoiser_config(settings, low_res=low_res)
    else:
        settings, low_res = settings_of(expected["flags"])
        config = denoiser_config(settings, low_res=low_res)
    denoiser = Denoiser(config).eval()
    state, order = weights(expected["shapes"]), settings["use_new_attention_order"]
    assert isinstance(config.unet, RegularUNetConfig)
    denoiser.net.load_state_dict(unet_weights(state, config.unet, new_attention_order=order))
    given = inputs(expected["side_px"], settings["diffusion_steps"], config.unet.in_channels)
    conditioning = Conditioning(labels=given["labels"] if settings["class_cond"] else None)
    if low_res:
        zeros = torch.zeros(2)
        conditioning = denoiser.with_low_res(conditioning, given["low_res"], zeros, torch.zeros_like(given["x0"]))
    return settings, denoiser, given, conditioning


def levels(denoiser: Denoiser, steps: Tensor) -> Tensor:
    """Noise levels of steps, float64."""
    schedule = denoiser.config.diffusion.schedule
    assert isinstance(schedule, Discrete)
    return schedule.sigmas()[steps]


def close(mine: Tensor, theirs: list[float], tolerance: float = 1e-5) -> None:
    expected = torch.tensor(theirs)
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@EACH_CASE
def test_a_unet_gives_the_same_here(case: str) -> None:
    _, denoiser, given, conditioning = imported(case)
    sigma = levels(denoiser, given["steps"])
    x = given["x0"] + sigma.float()[:, None, None, None] * given["noise"]
    with torch.no_grad():
        predicted, channels = denoiser.network(x, sigma, conditioning)
    output = predicted if channels is None else torch.cat([predicted, channels], dim=1)
    close(sampled(output), CASES[case]["output"])


def approximate_log_ndtr(x: Tensor) -> Tensor:
    """Theirs is an approximation of the normal distribution, which is exact here."""
    return (0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))).clamp(min=1e-12).log()


@EACH_CASE
def test_the_loss_of_each_image_is_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.special, "log_ndtr", approximate_log_ndtr)
    settings, denoiser, given, conditioning = imported(case)
    sigma = levels(denoiser, given["steps"])
    with torch.no_grad():
        loss = diffusion_loss(denoiser, given["x0"], sigma, given["noise"], conditioning)
    if settings.get("use_balanced_loss"):  # the mean of two errors, of which snr_plus_one is the sum
        loss = loss / 2
    assert loss.tolist() == pytest.approx(CASES[case]["loss"], rel=2e-5)


@EACH_CASE
def test_a_step_of_ancestral_sampling_and_of_ddim_is_the_same(case: str) -> None:
    settings, denoiser, given, conditioning = imported(case)
    session = SamplingConfig.model_validate(sampling(settings))
    sigmas = session.grid.sigmas(denoiser.config.diffusion.schedule, session.num_steps)
    position = session.num_steps - 1 - int(STEP * session.num_steps)
    sigma, sigma_next = sigmas[position : position + 2].float()
    denoise = guided(denoiser, conditioning, session.guidance, session.threshold)
    x = given["x0"] + sigma * given["noise"]
    for name, sampler in (("ancestral", Ancestral()), ("ddim", Ddim())):
        with torch.no_grad():
            result = sampler.step(denoise, x, sigma, sigma_next, lambda: given["step_noise"], History())
        close(sampled(result / (1 + sigma_next**2).sqrt()), CASES[case][name])
    assert session.sampler.kind == ("ddim" if settings["use_ddim"] else "ancestral")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_number_of_parameters_of_its_class(name: str) -> None:
    settings, low_res = settings_of(PUBLISHED[name]["flags"])
    net = build_on_meta(denoiser_config(settings, low_res=low_res).unet)
    assert sum(parameter.numel() for parameter in net.parameters()) == PUBLISHED[name]["parameters"]


def test_presets_are_published_models() -> None:
    for preset, name in (
        ("adm_64", "64x64_diffusion"),
        ("adm_256", "256x256_diffusion"),
        ("adm_256_upsampler", "64_256_upsampler"),
    ):
        settings, low_res = settings_of(PUBLISHED[name]["flags"])
        mine = denoiser_config(settings, low_res=low_res).unet.model_dump()
        assert PRESETS[preset].parameters == PUBLISHED[name]["parameters"]
        theirs = PRESETS[preset].config.model_dump()
        ignored = {"dropout", "upsample", "num_heads", "head_dim", "attention_resolutions"}
        assert {key: mine[key] for key in mine.keys() - ignored} == {key: theirs[key] for key in mine.keys() - ignored}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--image_size 48", "channel_mult is not given, and has no default for 48 pixels"),
        ("--image_size 64 --depth 3", "depth: not a flag"),
        ("--image_size sixty", "image_size must be a number"),
        ("--class_cond maybe", "class_cond must be True or False"),
        ("--channel_mult 1,two", "channel_mult must be numbers"),
        ("--noise_schedule sqrt", "noise_schedule must be linear or cosine"),
        ("--diffusion_steps 4000", "rescale_timesteps is not given, which matters with diffusion_steps 4000"),
        (
            "--diffusion_steps 4000 --learn_sigma True --rescale_timesteps True",
            "rescale_learned_sigmas is not given, which matters",
        ),
        ("--num_heads 3", "num_heads 3 does not divide"),
        ("--num_heads 4 --num_heads_upsample 3", "num_heads 3 does not divide"),
    ],
)
def test_flags_without_a_counterpart_are_refused_by_name(flags: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        denoiser_config(settings_of(flags)[0], low_res=False)


def test_flags_of_the_other_kind_of_model_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size is 64, but by its first convolution the model upsamples"):
        settings_of_flags({"image_size": "64"}, low_res=True)
    with pytest.raises(ValueError, match="small_size is 64, but by its first convolution the model does not"):
        settings_of_flags({"small_size": "64"}, low_res=False)


def test_weights_of_other_flags_are_refused() -> None:
    expected = CASES["ordered by kind"]
    settings, _ = settings_of(expected["flags"])
    unet = denoiser_config(settings, low_res=False).unet
    assert isinstance(unet, RegularUNetConfig)
    state = weights(expected["shapes"])
    for changed, words in (
        ({name: values for name, values in state.items() if "middle_block.0" not in name}, "tensors are missing"),
        (state | {"label_emb.weight": torch.ones(1000, 128)}, "label_emb.weight has shape"),
        (state | {"time_embed.0.bias": torch.ones(5)}, "time_embed.0.bias has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            unet_weights(changed, unet, new_attention_order=True)


def test_steps_of_sections_are_guided_diffusions() -> None:
    """1000 steps in three sections: the first has 334, and sections of one step have their first."""
    settings = settings_of("--timestep_respacing 2,1,1")[0]
    session = SamplingConfig.model_validate(sampling(settings))
    assert session.grid.model_dump() == {"kind": "listed", "steps": (667, 334, 333, 0)}
    session = SamplingConfig.model_validate(sampling(settings_of("--timestep_respacing 21")[0]))
    assert session.grid.model_dump()["steps"][10] == 499, "ten strides of 49.95 add up to less than 499.5"
    session = SamplingConfig.model_validate(sampling(settings_of("--timestep_respacing 250")[0]))
    assert session.grid.model_dump() == {"kind": "respaced", "sections": "250"}
    with pytest.raises(ValueError, match="400 steps requested of 333"):
        sampling(settings_of("--timestep_respacing 10,400,10")[0])


FORK = CASES["of the fork"]["config"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"txt": True}, "txt is True, but only False has a counterpart here: its encoder of transcriptions"),
        ({"using_capt": True}, "using_capt is True, but only False"),
        (
            {"bread_adapter_at_ds": 2},
            "bread_adapter_at_ds is 2, but only -1 has a counterpart here: there are no adapters",
        ),
        ({"use_snr_plus_one_loss": True}, "use_snr_plus_one_loss is True"),
        ({"noise_cond": True}, "noise_cond is True"),
        ({"num_experts": 2}, "num_experts: not a setting"),
        ({"num_channels": "64"}, 'num_channels must be like 128 \\(got "64"\\)'),
        ({"is_super_res": True}, "is_super_res is True, but by its first convolution it is False"),
        ({"channels_per_head_upsample": 32}, "channels_per_head_upsample is 32, but only channels_per_head, 16,"),
        ({"num_channels": 96, "channel_mult": "1,3"}, "num_channels: norms of 288 channels have 24 groups"),
        ({"num_channels": 96, "channel_mult": "3,3"}, "num_channels: norms of 288 channels have 24 groups"),
        ({"up_interp_mode": "area"}, "up_interp_mode is 'area'"),
    ],
)
def test_settings_of_the_fork_without_a_counterpart_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nostalgebraist.denoiser_config(nostalgebraist.settings_of_config(FORK | changes, low_res=False), low_res=False)


def test_the_fork_computes_activations_again_where_its_settings_say() -> None:
    settings = nostalgebraist.settings_of_config(FORK, low_res=False)
    unet = nostalgebraist.denoiser_config(settings, low_res=False).unet
    assert isinstance(unet, RegularUNetConfig)
    assert (unet.activation_checkpointing, unet.checkpointed_parts) == (True, ("up",))
