"""PRX's transformer: the same outputs, settings and tensors as diffusers' class, in both directions."""

from typing import Any

import pytest
import torch
from diffusers import PRXTransformer2DModel

from imagen_core.conversion.prx import (
    diffusers_tensors,
    transformer_config,
    transformer_settings,
    transformer_weights,
    why_not,
)
from imagen_core.models import Conditioning
from imagen_core.models.presets.unets import PRESETS
from imagen_core.models.transformer.model import TransformerConfig
from tests.imagen_core.models.small import random_weights, regular, transformer

TINY: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": 4,
    "context_in_dim": 10,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 3,
    "axes_dim": [8, 8],
}
PIXEL = TINY | {"bottleneck_size": 12, "resolution_embeds": True, "theta": 100, "mlp_ratio": 2.6, "time_factor": 50.0}
LATENT = TINY | {"in_channels": 5, "patch_size": 2}
VARIANT = pytest.mark.parametrize("settings", [TINY, PIXEL, LATENT], ids=["plain", "pixel", "latent"])


def theirs(settings: dict[str, Any]) -> Any:
    return random_weights(PRXTransformer2DModel(**settings)).eval()


def outputs(model: Any, ours: Any, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, settings["in_channels"], 16, 24, generator=generator)
    time, text = torch.rand(2, generator=generator), torch.randn(2, 5, 10, generator=generator)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    with torch.no_grad():
        expected = model(x, time, text, mask, return_dict=False)[0]
        return expected, ours(x, time, Conditioning(text=text, text_mask=mask))


@VARIANT
def test_outputs_are_those_of_diffusers_class_both_ways(settings: dict[str, Any]) -> None:
    model = theirs(settings)
    config = transformer_config(model.config, 16)
    ours = config.build()
    ours.load_state_dict(transformer_weights(model.state_dict(), config))
    expected, found = outputs(model, ours, settings)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    random_weights(ours, seed=1)
    again = PRXTransformer2DModel.from_config(transformer_settings(config))
    again.load_state_dict(diffusers_tensors(dict(ours.named_parameters()), config))
    expected, found = outputs(again.eval(), ours, settings)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@VARIANT
def test_tensors_and_settings_come_back_as_they_were(settings: dict[str, Any]) -> None:
    model = theirs(settings)
    config = transformer_config(model.config, 16)
    weights = diffusers_tensors(transformer_weights(model.state_dict(), config), config)
    assert weights.keys() == model.state_dict().keys()
    assert all(weights[name].equal(values) for name, values in model.state_dict().items())
    assert transformer_config(transformer_settings(config), 16) == config
    kept = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: transformer_settings(config)[name] for name in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "prx_pixel",
            {
                "in_channels": 3,
                "patch_size": 16,
                "context_in_dim": 2048,
                "hidden_size": 3584,
                "depth": 24,
                "axes_dim": [64, 64],
                "bottleneck_size": 768,
                "resolution_embeds": True,
            },
        ),
        ("prx_jit_32", {"in_channels": 3, "patch_size": 32, "bottleneck_size": 256}),
    ],
)
def test_a_preset_is_diffusers_class_to_the_parameter(name: str, settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = PRXTransformer2DModel(**settings)
    preset = PRESETS[name]
    assert sum(p.numel() for p in model.parameters()) == preset.parameters
    assert transformer_config(model.config, preset.config.image_size_px) == preset.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dim": [4, 12]}, r"axes_dim is \[4, 12\] for hidden_size 32 in 2 heads"),
        ({"time_max_period": 5000}, "time_max_period is 5000, but only 10000"),
        ({"qk_norm": False}, "qk_norm is no setting of a PRXTransformer2DModel that is known here"),
    ],
)
def test_settings_without_a_counterpart_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer_config(TINY | changes)


def test_tensors_that_do_not_fit_are_refused() -> None:
    config = transformer_config(TINY)
    tensors = theirs(TINY).state_dict()
    with pytest.raises(ValueError, match=r"blocks\.1\.gate_proj\.weight is missing"):
        transformer_weights({k: v for k, v in tensors.items() if k != "blocks.1.gate_proj.weight"}, config)
    with pytest.raises(ValueError, match=r"1 tensors are missing, among them the one named inputs\.text\.bias here"):
        transformer_weights({k: v for k, v in tensors.items() if k != "txt_in.bias"}, config)
    with pytest.raises(ValueError, match=r"vae\.weight has shape \(1,\), these settings make no such tensor"):
        transformer_weights(tensors | {"vae.weight": torch.ones(1)}, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "bias is True, not False"),
        ({"norm": "rms"}, "norm is 'rms', not 'layer'"),
        ({"num_classes": 3}, "num_classes is 3, not None"),
        ({"low_res": True}, "low_res is True, not False"),
        ({"out_channels": 6}, "out_channels is 6, not 3 as in_channels"),
        ({"text_dim": (10, 8)}, r"text_dim is \(10, 8\), not one width"),
        ({"bottleneck_bias": True}, "bottleneck_bias is True for bottleneck_dim None"),
    ],
)
def test_a_network_that_is_no_prx_is_named_with_its_setting(changes: dict[str, Any], message: str) -> None:
    config = transformer_config(TINY)
    assert why_not(config) is None
    settings = config.model_dump() | {"dropped_caption": "no_tokens"} | changes
    other = TransformerConfig.model_validate(settings)
    assert why_not(other) is not None
    with pytest.raises(ValueError, match=message):
        transformer_settings(other)


def test_other_families_are_no_prx() -> None:
    assert why_not(regular()) == "family is not 'transformer'"
    assert why_not(transformer()) == "norm is 'rms', not 'layer'"
