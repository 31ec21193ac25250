"""MinImagen's UNets, settings and weights, give the same here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.conversion.minimagen import unet_config, unet_weights
from imagen_core.models import Conditioning
from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.presets.unets import PRESETS
from tests.imagen_core.conversion.minimagen.numbers import inputs, sampled, weights

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("expected.json").read_text())


def config_of(settings: dict[str, Any], **changes: Any) -> HybridUNetConfig:
    settings = settings | changes
    low_res = settings["lowres_cond"]
    return unet_config(settings, text_dim=settings["text_embed_dim"], channels=3, low_res=low_res, size_px=8)


@pytest.mark.parametrize("case", EXPECTED)
def test_a_unet_of_minimagen_gives_the_same_here(case: str) -> None:
    expected = EXPECTED[case]
    config = config_of(expected["settings"])
    net = config.build().eval()
    net.load_state_dict(unet_weights(weights(expected["shapes"]), config))
    given = inputs(expected["settings"]["text_embed_dim"])
    for what, keep in (("with_caption", True), ("without_caption", False)):
        conditioning = Conditioning(
            text=given["text"],
            text_mask=given["mask"],
            text_keep=torch.full((2,), keep),
            low_res=given["low_res"] if config.low_res else None,
            low_res_noise=given["low_res_time"].float() if config.low_res else None,
        )
        with torch.no_grad():
            output = sampled(net(given["x"], given["time"].float(), conditioning))
        assert output.tolist() == pytest.approx(expected[what], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("case", "preset"), [("BaseTest", "minimagen_base_test"), ("SuperTest", "minimagen_super_test")]
)
def test_the_presets_are_minimagens_settings(case: str, preset: str) -> None:
    mine = config_of(EXPECTED[case]["settings"], text_embed_dim=768).model_dump(exclude={"image_size_px"})
    for unset, value in (("cross_num_heads", 8), ("cond_dim", 8)):
        mine[unset] = mine[unset] or value
    theirs = PRESETS[preset].config.model_dump(exclude={"image_size_px"})
    assert mine == theirs | {name: theirs[name] or value for name, value in (("cross_num_heads", 8), ("cond_dim", 8))}


def test_settings_without_a_counterpart_are_refused() -> None:
    with pytest.raises(ValueError, match="depth: not a setting"):
        config_of(EXPECTED["BaseTest"]["settings"], depth=2)


def test_weights_of_other_settings_are_refused() -> None:
    state = weights(EXPECTED["BaseTest"]["shapes"])
    config = config_of(EXPECTED["BaseTest"]["settings"])
    with pytest.raises(ValueError, match=r"text_to_cond.weight has shape \(8, 512\), these settings make"):
        unet_weights(state, config_of(EXPECTED["BaseTest"]["settings"], text_embed_dim=24))
    with pytest.raises(ValueError, match="tensors are missing"):
        unet_weights({name: values for name, values in state.items() if "mid_block2" not in name}, config)
    with pytest.raises(ValueError, match="is not zero"):
        unet_weights(state | {"mid_block1.cross_attn.fn.norm.beta": torch.ones(16)}, config)
