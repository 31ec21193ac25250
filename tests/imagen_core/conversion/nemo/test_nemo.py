"""NeMo's models, settings and weights, estimate the same images here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.conversion.nemo import denoiser_config
from imagen_core.conversion.nemo_unet import unet_weights
from imagen_core.diffusion import Denoiser
from imagen_core.models import Conditioning
from imagen_core.models.presets.unets import PRESETS
from tests.imagen_core.conversion.minimagen.numbers import sampled
from tests.imagen_core.conversion.nemo.numbers import LENGTHS, LOW_RES_LEVEL, SIGMAS, TIMES, inputs, weights

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("expected.json").read_text())
BASE, EFFICIENT = (EXPECTED[case]["model"] for case in ("base fused", "sr fused with noise"))


def imported(case: str, prefix: str = "model.model.unet.") -> Denoiser:
    denoiser = Denoiser(denoiser_config(EXPECTED[case]["model"])).eval()
    state = {prefix + name: values for name, values in weights(EXPECTED[case]["shapes"]).items()}
    denoiser.net.load_state_dict(unet_weights(state, denoiser.config.network))
    return denoiser


def changed(model: dict[str, Any], part: str = "unet", **changes: Any) -> dict[str, Any]:
    return model | {part: model[part] | changes}


def estimates(case: str, denoiser: Denoiser, *, keep: bool) -> Tensor:
    """What `make_expected` asks NeMo for."""
    model = EXPECTED[case]["model"]
    given, longest = inputs(model), max(LENGTHS)  # here captions are padded to the longest
    sigma = torch.tensor(SIGMAS)
    if model["preconditioning_type"] == "DDPM":
        time = torch.tensor(TIMES)
        cosine = model["preconditioning"]["noise_schedule"] == "cosine"
        sigma = ((time + 0.008) / 1.008 * math.pi / 2).tan() if cosine else torch.expm1(1e-4 + 10 * time**2).sqrt()
    conditioning = Conditioning(
        text=given["text"][:, :longest], text_mask=given["mask"][:, :longest], text_keep=torch.full((2,), keep)
    )
    if model["unet_type"] != "base":
        level = torch.full((2,), LOW_RES_LEVEL)
        conditioning = denoiser.with_low_res(conditioning, given["low_res"], level, given["low_res_noise"])
    with torch.no_grad():
        return sampled(denoiser(given["x0"] + sigma[:, None, None, None] * given["noise"], sigma, conditioning))


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPECTED)
def test_a_model_of_nemo_estimates_the_same_images_here(case: str) -> None:
    denoiser, expected = imported(case), EXPECTED[case]
    for what, keep in (("with_caption", True), ("without_caption", False)):
        theirs = torch.tensor(expected[what])
        mine = estimates(case, denoiser, keep=keep)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("prefix", ["", "model.module.model.unet.", "model.model.unet._orig_mod."])
def test_names_are_those_of_any_wrapper(prefix: str) -> None:
    plain, wrapped = (imported("sr self", prefix=p).state_dict() for p in ("unet.", prefix))
    assert all(values.equal(wrapped[name]) for name, values in plain.items())


def test_half_precision_weights_become_float32() -> None:
    state = {name: values.half() for name, values in weights(EXPECTED["sr self"]["shapes"]).items()}
    config = denoiser_config(EXPECTED["sr self"]["model"])
    assert {values.dtype for values in unet_weights(state, config.unet).values()} == {torch.float32}


PUBLISHED = {
    "500m_res_64": {"unet_type": "base", "unet": {"embed_dim": 256, "image_size": 64}},
    "400m_res_256": {
        "unet_type": "sr-unet",
        "noise_cond_aug": True,
        "unet": {
            "embed_dim": 128,
            "image_size": 256,
            "num_res_blocks": [2, 2, 3, 4, 3],
            "low_res_cond": True,
            "channel_mult": [1, 2, 4, 6, 6],
            "attention_resolutions": [32, 16],
        },
    },
    "600m_res_1024": {
        "unet_type": "sr",
        "noise_cond_aug": True,
        "unet": {
            "embed_dim": 128,
            "image_size": 1024,
            "channel_mult": [1, 2, 4, 8, 8],
            "attention_type": "cross",
            "atnn_enabled_at": [0, 0, 0, 1, 1],
            "num_resblocks": [2, 4, 8, 8, 8],
            "skip_connection_scaling": True,
        },
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_presets_are_nemos_settings_but_for_padding(preset: str) -> None:
    model = changed(PUBLISHED[preset], learned_sinu_pos_emb_dim=0) | {
        "conditioning": {"embed_dim": 1024, "token_length": 128},
        "preconditioning_type": "EDM",
    }
    mine, theirs = denoiser_config(model).unet, PRESETS[preset].config
    assert mine.padded_tokens == 128
    differing = {"padded_tokens", "resblock_upsample"}
    assert mine.model_dump(exclude=differing) == theirs.model_dump(exclude=differing)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (changed(EFFICIENT, stride=4), "unet.stride is 4, but only 2 has a counterpart here"),
        (changed(BASE, init_conv_kernel_size=7), "unet.init_conv_kernel_size is 7"),
        (changed(BASE, depth=2), "unet: depth: not a setting"),
        (changed(BASE, low_res_cond=True), "unet.low_res_cond is True, which no base UNet"),
        (changed(BASE, "preconditioning", sigma_max=1), "preconditioning: sigma_max: not a setting"),
        (changed(EXPECTED["base stacked"]["model"], "preconditioning", noise_schedule="sigmoid"), "cosine or linear"),
        (BASE | {"preconditioning_type": "VP"}, "must be EDM or DDPM"),
        (BASE | {"unet_type": "video"}, "must be base, sr-unet or sr"),
        (BASE | {"noise_cond_aug": True}, "low_res_noise needs low_res"),
        (EXPECTED["sr cross"]["model"] | {"noise_cond_aug": True}, "which NeMo's DDPM does not support"),
        ({"unet": BASE["unet"]}, "conditioning.embed_dim is missing"),
    ],
)
def test_settings_without_a_counterpart_are_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        denoiser_config(model)


def test_weights_of_other_settings_are_refused() -> None:
    state, config = weights(EXPECTED["base fused"]["shapes"]), denoiser_config(BASE).unet
    with pytest.raises(
        ValueError, match=r"attention_pooling.2.weight has shape \(64, 32\), these settings make shape"
    ):
        unet_weights(state, denoiser_config(changed(BASE, cond_dim=32)).unet)
    with pytest.raises(ValueError, match="tensors are missing"):
        unet_weights({name: t for name, t in state.items() if "middle_block.2" not in name}, config)
    with pytest.raises(ValueError, match="under two names with different values"):
        unet_weights(state | {"init_conv.0.bias": torch.ones(32)}, config)
    with pytest.raises(ValueError, match=r"model\.vae\.weight has shape"):
        unet_weights(state | {"model.vae.weight": torch.ones(3)}, config)
