"""DALL-E 2's prior network on small models, and the counts of the published ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.layers.attention import Attention
from imagen_core.models.layers.positions import RelativePositionBias, Rotary
from imagen_core.models.presets.priors import PRIOR_PRESETS
from imagen_core.models.prior import PriorNetwork, PriorNetworkConfig
from tests.imagen_core.models.small import captions, random_weights

PUBLISHED = {"dalle2_prior": 101_756_560, "dalle2_prior_large": 249_416_720, "dalle2_prior_small": 24_918_544}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {"num_timesteps": 20, "ff_norm": True},
    "tokens": {"num_time_tokens": 2, "num_image_tokens": 3, "num_text_embed_tokens": 2, "self_conditioning": True},
    "one_embedding": {"text_dim": None, "rotary": False, "norm_out": False, "final_projection": False},
    "same_width": {"text_dim": 16},
    "imported": {
        "text_dim": None,
        "learned_text_tokens": True,
        "unit_text_embed": True,
        "sinusoids": "closed",
        "null_position": True,
        "cosine_attention": False,
        "stable_norm_out": True,
    },
}


def network(**changes: Any) -> PriorNetwork:
    options = {"dim": 16, "depth": 2, "num_heads": 2, "head_dim": 8, "text_dim": 12, "max_text_tokens": 12}
    return random_weights(PriorNetworkConfig.model_validate(options | changes).build()).double()


def inputs(model: PriorNetwork, padded_to: int = 6) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, c_noise, embed, estimate = normal(2, 16), torch.tensor([3.0, 11.0]).double(), normal(2, 16), normal(2, 16)
    text = mask = None
    if model.config.text_dim is not None:
        text, mask = captions((3, 5), padded_to, model.config.text_dim, dtype=torch.float64)
    if not model.config.self_conditioning:
        estimate = None
    return x, c_noise, Conditioning(text=text, text_mask=mask, text_embed=embed, estimate=estimate)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_published_priors_have_exactly_their_parameters(name: str) -> None:
    with torch.device("meta"):
        model = PRIOR_PRESETS[name].config.build()
    assert sum(p.numel() for p in model.parameters()) == PRIOR_PRESETS[name].parameters == PUBLISHED[name]
    assert set(PRIOR_PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_padding_changes_nothing_and_every_parameter_and_condition_has_an_effect(variant: str) -> None:
    model = network(**VARIANTS[variant])
    x, c_noise, conditioning = inputs(model)
    conditioning = replace(
        conditioning, text_keep=torch.tensor([True, False]), image_embed_keep=torch.tensor([False, True])
    )
    result = model(x, c_noise, conditioning)
    longer = replace(inputs(model, 9)[2], text_keep=conditioning.text_keep)
    longer = replace(longer, image_embed_keep=conditioning.image_embed_keep)
    torch.testing.assert_close(result, model(x, c_noise, longer))
    result.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), name
    plain = replace(conditioning, text_keep=None, image_embed_keep=None)
    result = model(x, c_noise, plain)
    assert not torch.allclose(result, model(x.flip(0), c_noise, plain))
    assert not torch.allclose(result, model(x, c_noise + 3, plain))
    for name in ("text", "text_embed", "estimate"):
        value = getattr(plain, name)
        if value is not None:
            assert not torch.allclose(result, model(x, c_noise, replace(plain, **{name: value.flip(0)}))), name


def test_a_caption_or_embedding_that_is_not_kept_is_not_seen() -> None:
    model = network()
    x, c_noise, conditioning = inputs(model)
    assert conditioning.text is not None
    assert conditioning.text_embed is not None
    other = replace(conditioning, text=conditioning.text * 2, text_embed=conditioning.text_embed * 3)
    keep = torch.tensor([True, False])
    first, second = (model(x, c_noise, replace(c, text_keep=keep)) for c in (conditioning, other))
    torch.testing.assert_close(first[1], second[1])
    assert not torch.allclose(first[0], second[0])
    first, second = (model(y, c_noise, replace(conditioning, image_embed_keep=keep)) for y in (x, x.flip(1)))
    torch.testing.assert_close(first[1], second[1])
    assert not torch.allclose(first[0], second[0])


def test_no_token_sees_a_later_one() -> None:
    """The noisy embedding comes after 12 tokens of the caption, one of its embedding and one of the time."""
    model = network()
    x, c_noise, conditioning = inputs(model)
    seen: list[Tensor] = []
    model.layers[-1].register_forward_hook(lambda _, __, tokens: seen.append(tokens))
    model(x, c_noise, conditioning)
    model(x.flip(1), c_noise, conditioning)
    assert seen[0].shape == (2, 12 + 1 + 1 + 1 + 1, 16)
    changed = (seen[0] != seen[1]).any(dim=-1)
    assert changed.tolist() == [[False] * 14 + [True] * 2] * 2


@pytest.mark.parametrize("rotary", [True, False])
def test_rotary_positions_alone_tell_the_order_of_tokens(rotary: bool) -> None:
    """With one layer and without the bias of distances, the last token would see the others as a set."""
    model = network(depth=1, rotary=rotary)
    with torch.no_grad():
        model.bias.embedding.weight.zero_()
    x, c_noise, conditioning = inputs(model)
    assert conditioning.text is not None
    swapped = replace(conditioning, text=conditioning.text[:, [1, 0, *range(2, 6)]])
    one, other = (model(x, c_noise, c) for c in (conditioning, swapped))
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-9) != rotary


def test_causal_attention_with_bias_and_fixed_cosine_scale_is_the_sum_written_out() -> None:
    attention = random_weights(
        Attention(
            8,
            kind="self",
            num_heads=2,
            head_dim=4,
            num_kv_heads=1,
            bias=False,
            null_kv=True,
            qk_norm=16.0,
            causal=True,
        ).double()
    )
    assert attention.to_kv is not None
    assert attention.null_kv is not None
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    bias = torch.randn(2, 5, 5, dtype=torch.float64)
    q = (x[0] @ attention.to_q.weight.T).view(5, 2, 4)
    k, v = (x[0] @ attention.to_kv.weight.T).split(4, dim=-1)
    result = torch.zeros(5, 2, 4, dtype=torch.float64)
    for head in range(2):
        for i in range(5):
            keys = torch.cat([attention.null_kv[:1], k[: i + 1]])
            values = torch.cat([attention.null_kv[1:], v[: i + 1]])
            unit = keys / keys.norm(dim=-1, keepdim=True)
            logits = 16 * unit @ (q[i, head] / q[i, head].norm())
            logits[1:] += bias[head, i, : i + 1]
            result[i, head] = logits.softmax(dim=0) @ values
    torch.testing.assert_close(attention(x, bias=bias)[0], result.flatten(1) @ attention.to_out.weight.T)


def test_rotary_attention_depends_on_distances_only() -> None:
    rotary = Rotary(4).double()
    q, k = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    same_q, same_k = q[:1].expand(6, -1), k[:1].expand(6, -1)
    logits = rotary(same_q) @ rotary(same_k).T
    for distance in range(-5, 6):
        diagonal = logits.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(logits[0, 0], logits[0, 3])
    torch.testing.assert_close(rotary(q).norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_position_buckets_are_those_of_t5(bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 301)
    ours = RelativePositionBias(2, bidirectional=bidirectional).bucket(distances)
    expected = T5Attention._relative_position_bucket(distances, bidirectional=bidirectional)
    assert torch.equal(ours, expected)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = network()
    x, c_noise, conditioning = inputs(model)
    with pytest.raises(ValueError, match=r"13 tokens, this model reads at most 12"):
        model(x, c_noise, inputs(model, 13)[2])
    with pytest.raises(ValueError, match=r"conditioning\.text_embed: a prior reads"):
        model(x, c_noise, replace(conditioning, text_embed=None))
    with pytest.raises(ValueError, match=r"reads 16-wide embeddings \(got 9\)"):
        model(x, c_noise, replace(conditioning, text_embed=torch.zeros(2, 9)))
