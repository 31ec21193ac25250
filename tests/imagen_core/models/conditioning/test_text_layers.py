"""Layers of a text encoder, and a caption's one vector, as conditions of every family of networks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from imagen_core.diffusion import DenoiserConfig
from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.conditioning.text_layers import TextLayers
from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.train.memory import estimate_memory
from tests.imagen_core.models.small import efficient, random_weights, regular, transformer

LAYERS, DIM, VECTOR = 3, 12, 10
HYBRID = {
    "image_size_px": 16,
    "dim": 16,
    "dim_mults": (1, 2),
    "num_res_blocks": (1, 1),
    "attention_levels": (False, True),
    "cross_attention_levels": (False, True),
    "num_heads": 2,
    "head_dim": 8,
    "text_dim": DIM,
    "max_text_tokens": 12,
}
PRIOR = {"dim": 16, "depth": 1, "num_heads": 2, "head_dim": 8, "text_dim": DIM, "max_text_tokens": 12}


def config(family: str, **changes: Any) -> Any:
    if family == "prior":
        return PriorNetworkConfig.model_validate(PRIOR | changes)
    if family == "hybrid":
        return HybridUNetConfig.model_validate(HYBRID | changes)
    if family == "transformer":
        return transformer(**changes)
    return regular(**changes) if family == "regular" else efficient(low_res=False, **changes)


FAMILIES = ("regular", "efficient", "hybrid", "transformer", "prior")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(family: str, *, vector: bool = False) -> tuple[Tensor, Tensor, Conditioning]:
    mask = torch.tensor([[True] * 3 + [False], [True] * 4])
    text = normal(2, 4, LAYERS, DIM) * mask[..., None, None]
    embed = normal(2, 16, seed=1) if family == "prior" else normal(2, VECTOR, seed=1) if vector else None
    x = normal(2, 16, seed=2) if family == "prior" else normal(2, 3, 16, 16, seed=2)
    return x, torch.tensor([3.0, 11.0]).double(), Conditioning(text=text, text_mask=mask, text_embed=embed)


def test_the_weighted_sum_starts_as_the_mean_and_is_that_of_a_softmax() -> None:
    layers, conditioning = TextLayers(LAYERS, "weighted_sum").double(), inputs("regular")[2]
    text = conditioning.text
    assert text is not None
    torch.testing.assert_close(layers(conditioning).text, text.mean(dim=2))
    assert layers.weights is not None
    with torch.no_grad():
        layers.weights.copy_(torch.tensor([0.0, 1.0, 2.0]).log().clamp(min=-1e4))
    torch.testing.assert_close(layers(conditioning).text, (text[:, :, 1] + 2 * text[:, :, 2]) / 3)


@pytest.mark.parametrize("family", ["regular", "hybrid", "prior"])
def test_layers_side_by_side_are_those_of_an_encoder_that_joins_them(family: str) -> None:
    apart = random_weights(config(family, num_text_layers=LAYERS, text_layer_join="concat").build()).double()
    whole = config(family, text_dim=LAYERS * DIM).build().double()
    whole.load_state_dict(apart.state_dict())
    x, c_noise, conditioning = inputs(family)
    assert conditioning.text is not None
    flat = replace(conditioning, text=conditioning.text.flatten(2))
    torch.testing.assert_close(apart(x, c_noise, conditioning), whole(x, c_noise, flat))


def test_the_context_of_an_efficient_unet_has_the_width_of_one_layer() -> None:
    model = config("efficient", num_text_layers=LAYERS, text_layer_join="concat").build()
    assert model.inputs.text.to_context.weight.shape == (DIM, LAYERS * DIM)
    model.double()(*inputs("efficient"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_its_weight_has_an_effect_and_a_dropped_caption_has_none(family: str) -> None:
    model = random_weights(config(family, num_text_layers=LAYERS).build()).double()
    x, c_noise, conditioning = inputs(family)
    assert conditioning.text is not None
    text = conditioning.text.clone().requires_grad_()
    model(x, c_noise, replace(conditioning, text=text)).square().sum().backward()
    assert text.grad is not None
    assert (text.grad.abs().sum(dim=(0, 1, 3)) > 0).all()
    assert not text.grad[0, 3].any(), "padding"
    (weights,) = [p for name, p in model.named_parameters() if name.endswith("text_layers.weights")]
    assert weights.grad is not None
    assert (weights.grad != 0).all()
    dropped = conditioning.without("text")
    other = replace(dropped, text=torch.roll(conditioning.text, 1, dims=2))
    torch.testing.assert_close(model(x, c_noise, dropped), model(x, c_noise, other))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_of_layers_is_refused(family: str) -> None:
    x, c_noise, conditioning = inputs(family)
    assert conditioning.text is not None
    model = config(family, num_text_layers=LAYERS).build().double()
    for wrong in (conditioning.text[:, :, :2], conditioning.text[:, :, 0]):
        with pytest.raises(ValueError, match=r"conditioning\.text: this model reads \(captions, tokens, 3 layers"):
            model(x, c_noise, replace(conditioning, text=wrong))
    plain = config(family).build().double()
    with pytest.raises(ValueError, match="this model reads no layers"):
        plain(x, c_noise, conditioning)
    with pytest.raises(ValidationError, match="num_text_layers is 3, but text_dim is null"):
        config(family, num_text_layers=LAYERS, text_dim=None)


@pytest.mark.parametrize("family", ["regular", "efficient", "hybrid"])
def test_a_captions_vector_has_an_effect_unless_the_caption_is_dropped(family: str) -> None:
    model = random_weights(config(family, num_text_layers=LAYERS, text_embed_dim=VECTOR).build()).double()
    x, c_noise, conditioning = inputs(family, vector=True)
    assert conditioning.text_embed is not None
    other = replace(conditioning, text_embed=-conditioning.text_embed)
    assert not torch.allclose(model(x, c_noise, conditioning), model(x, c_noise, other))
    keep = torch.tensor([True, False])
    one, two = (model(x, c_noise, each.with_keep("text", keep)) for each in (conditioning, other))
    assert not torch.allclose(one[0], two[0])
    torch.testing.assert_close(one[1], two[1])
    with pytest.raises(ValueError, match=r"conditioning\.text_embed: this model reads captions as one vector"):
        model(x, c_noise, replace(conditioning, text_embed=None))
    with pytest.raises(ValueError, match=r"reads 10-wide embeddings \(got 9\)"):
        model(x, c_noise, replace(conditioning, text_embed=conditioning.text_embed[:, :9]))


def test_the_estimate_of_memory_counts_the_layers() -> None:
    def estimate(**changes: Any) -> Any:
        settings = DenoiserConfig(unet=regular(**changes), size_px=16)
        return estimate_memory(
            settings,
            micro_batch_size=1,
            shape=(16, 16),
            num_tokens=64,
            bytes_per_activation=4,
            num_averages=1,
            num_shards=1,
        )

    plain, layers = estimate(), estimate(num_text_layers=LAYERS, text_embed_dim=VECTOR)
    more = sum(p.numel() for p in regular(num_text_layers=LAYERS, text_embed_dim=VECTOR).build().parameters())
    assert layers.weights == 4 * more > plain.weights
    assert layers.activations - plain.activations >= 4 * 64 * LAYERS * DIM
