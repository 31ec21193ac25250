"""DeepFloyd IF's UNets of diffusers as Regular UNets: outputs, parameters, and the way back."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.conversion.deepfloyd_unet import (
    MAX_TOKENS,
    diffusers_weights,
    unet_config,
    unet_settings,
    unet_weights,
    why_not,
)
from imagen_core.models import Conditioning
from imagen_core.models.presets.deepfloyd import DEEPFLOYD_PRESETS
from imagen_core.models.presets.unets import PRESETS
from imagen_core.models.unet.regular import RegularUNetConfig
from tests.diffusers_layout import TEXT_DIM, UNETS, unet_state

TWICE = UNETS[2] | {"resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "act_fn": "silu"}
TWICE |= {"time_embedding_act_fn": "silu"}
TEXT_ONLY = UNETS[2] | {"only_cross_attention": True}
SHIFT = UNETS[1] | {"resnet_time_scale_shift": "default", "conv_in_kernel": 5, "act_fn": "swish"}
VARIANTS = {"I": UNETS[1], "II": UNETS[2], "activated twice": TWICE, "text only": TEXT_ONLY, "shift": SHIFT}


def theirs(settings: dict[str, Any]) -> Any:
    """diffusers' network, where no layer is zero."""
    torch.manual_seed(0)
    net = importlib.import_module("diffusers").UNet2DConditionModel.from_config(settings).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_are_those_of_diffusers(name: str, batch: int) -> None:
    settings = VARIANTS[name]
    other = theirs(settings)
    config = unet_config(dict(other.config))
    mine = config.build().eval()
    mine.load_state_dict(unet_weights(other.state_dict(), config))
    size, low_res = settings["sample_size"], settings["in_channels"] == 6
    x, text = torch.randn(batch, 3, size, size), torch.randn(batch, MAX_TOKENS, TEXT_DIM)
    step, level = torch.tensor([0, 500, 999])[:batch], torch.tensor([250, 0, 999])[:batch]
    upsampled = torch.randn_like(x) if low_res else None
    conditioning = Conditioning(text=text, low_res=upsampled, low_res_noise=level.float() if low_res else None)
    joined = x if upsampled is None else torch.cat([x, upsampled], dim=1)
    with torch.no_grad():
        expected = other(joined, step, text, class_labels=level if low_res else None).sample
        found = mine(x, step.float(), conditioning)
    assert float(expected.std()) > 0.05, "or the comparison would show nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_padding_that_is_masked_is_pooled_and_normalised_but_not_attended_to() -> None:
    other = theirs(UNETS[1])
    config = unet_config(UNETS[1])
    mine = config.build().eval()
    mine.load_state_dict(unet_weights(other.state_dict(), config))
    x, text = torch.randn(2, 3, 16, 16), torch.randn(2, 9, TEXT_DIM)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    padded = torch.zeros(2, MAX_TOKENS, TEXT_DIM)
    padded[:, :9] = text * mask[..., None]
    full_mask = torch.nn.functional.pad(mask, (0, MAX_TOKENS - 9))
    step = torch.tensor([7, 640])
    with torch.no_grad():
        expected = other(x, step, padded, encoder_attention_mask=full_mask).sample
        found = mine(x, step.float(), Conditioning(text=text, text_mask=mask))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(DEEPFLOYD_PRESETS))
def test_a_preset_has_as_many_parameters_as_diffusers_class_from_the_same_settings(name: str) -> None:
    preset = PRESETS[name]
    build = importlib.import_module("diffusers").UNet2DConditionModel.from_config
    with torch.device("meta"):
        other = build(unet_settings(unet_of(preset)))
    assert sum(parameter.numel() for parameter in other.parameters()) == preset.parameters
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    with torch.device("meta"):
        mine = preset.config.build().state_dict()
    assert {key: value.shape for key, value in diffusers_weights(mine, unet_of(preset)).items()} == shapes


def unet_of(preset: Any) -> RegularUNetConfig:
    assert isinstance(preset.config, RegularUNetConfig)
    return preset.config


_PUBLISHED = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": "group_norm",
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 6,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "scale_shift",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": False,
    "use_linear_projection": False,
}
PUBLISHED = {
    "if_i_xl": _PUBLISHED
    | {
        "addition_time_embed_dim": None,
        "block_out_channels": [704, 1408, 2112, 2816],
        "class_embed_type": None,
        "cross_attention_dim": 2816,
        "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        "in_channels": 3,
        "layers_per_block": 3,
        "mid_block_scale_factor": 1,
        "num_attention_heads": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "sample_size": 64,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "transformer_layers_per_block": 1,
    },
    "if_ii_l": _PUBLISHED
    | {
        "block_out_channels": [160, 320, 640, 960, 1280],
        "class_embed_type": "timestep",
        "cross_attention_dim": 1280,
        "down_block_types": [*["ResnetDownsampleBlock2D"] * 3, *["SimpleCrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 2, *["ResnetUpsampleBlock2D"] * 3],
        "in_channels": 6,
        "layers_per_block": [2, 2, 3, 5, 5],
        "mid_block_scale_factor": 1.4142271248762552,
        "resnet_out_scale_factor": 1.4142271248762552,
        "resnet_skip_time_act": True,
        "sample_size": 256,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 1280,
    },
}
"""config.json of IF-I-XL and IF-II-L."""


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_published_settings_are_those_of_the_preset(name: str) -> None:
    config, preset = unet_config(PUBLISHED[name]), unet_of(PRESETS[name])
    assert config.blocks_per_level == preset.blocks_per_level
    assert set(config.attention_resolutions) == set(preset.attention_resolutions)
    same = {"num_res_blocks": 1, "attention_resolutions": ()}
    assert config.model_copy(update=same) == preset.model_copy(update=same)


@pytest.mark.parametrize("number", [1, 2])
def test_settings_survive_the_way_back(number: int) -> None:
    config = unet_config(UNETS[number])
    settings = unet_settings(config)
    assert unet_config(settings) == config
    written = {key: value for key, value in UNETS[number].items() if not key.startswith("_diffusers")}
    found = {key: settings[key] for key in written}
    if number == 1:
        assert found.pop("layers_per_block") == [written.pop("layers_per_block")] * 2
    assert found == written


@pytest.mark.parametrize("number", [1, 2])
def test_weights_survive_the_way_back_bit_for_bit(number: int) -> None:
    state, config = unet_state(number), unet_config(UNETS[number])
    back = diffusers_weights(unet_weights(state, config), config)
    assert list(back) != []
    assert {name: (values.shape, values.dtype) for name, values in back.items()} == {
        name: (values.shape, values.dtype) for name, values in state.items()
    }
    assert all(back[name].equal(state[name]) for name in state)


def test_half_precision_becomes_float32_and_half_precision_again() -> None:
    config = unet_config(UNETS[1])
    state = {name: values.half() for name, values in unet_state(1).items()}
    mine = unet_weights(state, config)
    assert {values.dtype for values in mine.values()} == {torch.float32}
    back = diffusers_weights(mine, config)
    assert all(back[name].half().equal(state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cross_attention_dim": None}, "cross_attention_dim is missing"),
        ({"cross_attention_dim": 40}, "cross_attention_dim must be a multiple of 32 (got 40)"),
        ({"depth": 3}, "depth: not a setting of the UNet2DConditionModel known here"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16, but a DeepFloyd IF has 32"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time', but a DeepFloyd IF has 'text'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type is 'UNetMidBlock2DCrossAttn'"),
        ({"act_fn": "mish"}, "act_fn must be 'silu' or 'swish' or 'gelu' (got 'mish')"),
        ({"class_embed_type": "projection"}, "class_embed_type must be None or 'timestep' (got 'projection')"),
        ({"out_channels": 3}, "in_channels is 3 and out_channels 3; a DeepFloyd IF reads an image and predicts"),
        ({"in_channels": 7, "class_embed_type": "timestep"}, "in_channels is 7 and out_channels 6"),
        ({"block_out_channels": [64, 96]}, "block_out_channels: the first must divide the others (got [64, 96])"),
        ({"block_out_channels": 64}, "block_out_channels must be positive whole numbers (got 64)"),
        ({"layers_per_block": [1, 0]}, "layers_per_block must be positive whole numbers (got [1, 0])"),
        ({"attention_head_dim": [8, 16]}, "attention_head_dim must be one whole number for all levels (got [8, 16])"),
        ({"attention_head_dim": 7}, "head_dim 7 does not divide the 64 channels"),
        ({"sample_size": [64, 32]}, "sample_size must be one number of pixels (got [64, 32])"),
        ({"only_cross_attention": [True, False]}, "only one kind of attention for all levels has a counterpart"),
        ({"mid_block_only_cross_attention": True}, "only one kind of attention for all levels has a counterpart"),
        (
            {"down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"]},
            "DownBlock2D is no block of a DeepFloyd",
        ),
        ({"up_block_types": ["ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"]}, "must mirror down_block_types"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn is 'silu', but act_fn 'gelu'"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act is true without time_embedding_act_fn"),
        ({"addition_embed_type_num_heads": 5}, "pooling_heads 5 does not divide the text's width 64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_a_setting_without_a_counterpart_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        unet_config(UNETS[1] | change)
    assert words in str(caught.value)


def test_weights_of_another_network_are_refused_by_name() -> None:
    config, state = unet_config(UNETS[1]), unet_state(1)

    def refused(changed: dict[str, Tensor], words: str) -> None:
        with pytest.raises(ValueError) as caught:
            unet_weights(changed, config)
        assert words in str(caught.value)

    name = "up_blocks.0.attentions.1.add_k_proj.weight"
    refused({key: value for key, value in state.items() if key != name}, f"{name} is missing (1 of {len(state)}")
    refused(state | {"extra": torch.zeros(1)}, "extra has no place in a network of these settings")
    refused(
        state | {name: torch.zeros(3, 3)}, f"{name} (3, 3) and up_blocks.0.attentions.1.add_v_proj.weight (64, 32)"
    )
    refused(state | {"conv_in.weight": torch.zeros(32, 4, 3, 3)}, "conv_in.weight has shape (32, 4, 3, 3)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooling": "attention"}, "pooling is 'attention', not 'multihead'"),
        ({"attention_type": "stacked"}, "attention_type is 'stacked', not 'fused' or 'cross'"),
        ({"shared_norm": False}, "shared_norm is False, not True"),
        ({"resblock_updown": False}, "resblock_updown is False"),
        ({"num_heads": 8}, "num_heads is 8, not None"),
        ({"up_num_heads": 2}, "up_num_heads is 2, not None"),
        ({"middle_num_heads": 2}, "middle_num_heads is 2, not None"),
        ({"num_classes": 10}, "num_classes is 10, not None"),
        ({"padded_tokens": None}, "padded_tokens is null"),
        ({"low_res_noise": False}, "low_res_noise is false, though it upsamples"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_why_diffusers_has_no_such_network_is_said(change: dict[str, Any], words: str) -> None:
    config = unet_config(UNETS[2])
    assert why_not(config) is None
    changed = config.model_validate(config.model_dump() | change)
    assert words in str(why_not(changed))
    with pytest.raises(ValueError, match="diffusers has no such network"):
        unet_settings(changed)


def test_a_network_of_another_family_has_no_counterpart() -> None:
    assert why_not(PRESETS["600m_res_256"].config) == "family is 'efficient', not regular"
    assert why_not(PRESETS["adm_64"].config) == "pooling is 'attention', not 'multihead'"
