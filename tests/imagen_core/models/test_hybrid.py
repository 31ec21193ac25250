"""The Hybrid family on small models with random weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from imagen_core.models.conditioning import Conditioning
from imagen_core.models.hybrid import HybridUNet
from imagen_core.models.hybrid_blocks import GlobalContext
from imagen_core.models.hybrid_config import HybridUNetConfig
from tests.imagen_core.models.small import TEXT_DIM, captions, other_conditions, random_weights

VARIANTS: dict[str, dict[str, Any]] = {
    "paddle": {},
    "imagen_pytorch": {"norm": "rms", "qk_norm": True},
    "minimagen": {
        "perceiver": False,
        "attend_to_conditions": False,
        "middle_attention": False,
        "halve": "conv",
        "double": "repeat_conv",
        "global_context": False,
        "final_global_context": False,
        "num_fourier_frequencies": None,
    },
    "super_resolution": {"memory_efficient": True, "initial_res_block": True, "low_res": True, "low_res_noise": True},
    "without_captions": {"text_dim": None, "unread_caption_parameters": True},
    "dalle2_decoder": {
        "text_in_middle_only": True,
        "caption_vector": False,
        "perceiver": False,
        "conditions_in": "other_blocks",
        "image_embed_dim": 10,
        "cross_num_heads": 3,
        "cross_head_dim": 4,
        "ff_mult": 0,
        "attend_to_conditions": False,
        "deepest_widen": "conv",
        "res_block": "conv_first",
        "init_residual": True,
        "out_kernel_size": 1,
    },
    "linear_attention": {"attention_levels": (True, "linear"), "cross_attention_levels": (True, "linear")},
    "other_options": {
        "transformer_depth": (1, 2),
        "halve": "cross_embed",
        "weight_standardization": True,
        "combine_up_features": True,
        "num_classes": 5,
        "self_conditioning": True,
        "condition_channels": 2,
    },
}


def config(**changes: Any) -> HybridUNetConfig:
    options = {
        "image_size_px": 16,
        "dim": 16,
        "dim_mults": (1, 2),
        "num_res_blocks": (1, 2),
        "attention_levels": (False, True),
        "cross_attention_levels": (False, True),
        "num_heads": 2,
        "head_dim": 8,
        "text_dim": TEXT_DIM,
        "max_text_tokens": 12,
    }
    return HybridUNetConfig.model_validate(options | changes)


def unet(dtype: torch.dtype = torch.float64, **changes: Any) -> HybridUNet:
    return random_weights(config(**changes).build().to(dtype))


def inputs(model: HybridUNet, padded_to: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    c_noise = torch.tensor([0.3, -0.7], dtype=dtype)
    text, mask = captions((3, 5), padded_to, dtype=dtype) if model.config.text_dim else (None, None)
    low = model.config.low_res
    more = other_conditions(model.config, 2, dtype)
    conditioning = replace(more, text=text, text_mask=mask, low_res=x.flip(0) if low else None,
                           low_res_noise=c_noise.flip(0) if low else None)  # fmt: skip
    return x, c_noise, conditioning


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_padding_changes_nothing_and_every_trained_parameter_has_a_gradient(variant: str) -> None:
    model = unet(**VARIANTS[variant])
    short, long = (model(*inputs(model, padded_to)) for padded_to in (5, 9))
    torch.testing.assert_close(short, long)
    assert short.shape == (2, 3, 16, 16)
    short.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert "unread" in name


@pytest.mark.parametrize("variant", ["paddle", "minimagen"])
def test_a_dropped_caption_is_the_learned_one_whatever_it_was(variant: str) -> None:
    model = unet(**VARIANTS[variant])
    x, c_noise, conditioning = inputs(model)
    keep = torch.tensor([True, False])
    first = model(x, c_noise, replace(conditioning, text_keep=keep))
    assert conditioning.text is not None
    other = replace(conditioning, text=conditioning.text * 3, text_mask=torch.ones(2, 6, dtype=torch.bool))
    second = model(x, c_noise, replace(other, text_keep=keep))
    torch.testing.assert_close(first[1], second[1])
    assert not torch.allclose(first[0], second[0])


def test_global_context_gates_with_the_attention_pooled_pixel() -> None:
    gate = random_weights(GlobalContext(8).double())
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    pixels = x.flatten(2)  # (b, c, n)
    scores = torch.einsum("c,bcn->bn", gate.score.weight[0, :, 0, 0], pixels) + gate.score.bias
    weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    pooled = (pixels * weights[:, None]).sum(dim=2)
    first, last = gate.gate[0], gate.gate[2]
    hidden = torch.nn.functional.silu(pooled @ first.weight[:, :, 0, 0].T + first.bias)
    expected = x * torch.sigmoid(hidden @ last.weight[:, :, 0, 0].T + last.bias)[:, :, None, None]
    torch.testing.assert_close(gate(x), expected)


def test_recomputing_activations_gives_the_same_gradients() -> None:
    plain = unet()
    recomputed = unet(activation_checkpointing=True)
    for model in (plain, recomputed):
        model(*inputs(model)).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@torch.no_grad()
def test_channels_last_and_bfloat16_agree() -> None:
    model = unet(torch.float32)
    x, c_noise, conditioning = inputs(model, dtype=torch.float32)
    expected = model(x, c_noise, conditioning)
    fast = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x.to(memory_format=torch.channels_last), c_noise, conditioning), expected,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, c_noise, conditioning)
    assert float((rough.float() - expected).norm() / expected.norm()) < 0.05


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = unet()
    x, c_noise, conditioning = inputs(model, padded_to=13)
    with pytest.raises(ValueError, match=r"13 tokens, this model reads at most 12"):
        model(x, c_noise, conditioning)
    with pytest.raises(ValueError, match=r"multiples of 2 px"):
        model(x[..., :15], c_noise, conditioning)
    with pytest.raises(ValueError, match=r"conditioning\.text"):
        model(x, c_noise, Conditioning())
    with pytest.raises(ValidationError, match="attention_levels has 1 entries for 2 levels"):
        config(attention_levels=(True,))
    with pytest.raises(ValidationError, match=r"unread_caption_parameters is for models without captions"):
        config(unread_caption_parameters=True)


def test_the_configuration_survives_json() -> None:
    assert HybridUNetConfig.model_validate_json(config().model_dump_json()) == config()
