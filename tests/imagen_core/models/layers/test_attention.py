"""Attention against the formula, with masks, and at the edges where softmax has nothing to choose from."""

import pytest
import torch
from torch import Tensor

from imagen_core.models.layers.attention import (
    Attention,
    PixelAttention,
    StackedAttention,
    flatten_pixels,
    unflatten_pixels,
)
from tests.imagen_core.models.small import random_weights

DIM, CONTEXT, HEADS, HEAD_DIM = 12, 10, 3, 4


def attention(kind: str, **options: object) -> Attention:
    module = Attention(
        DIM,
        kind=kind,  # type: ignore[arg-type]
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        context_dim=None if kind == "self" else CONTEXT,
        **options,  # type: ignore[arg-type]
    )
    return random_weights(module).double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_formula(module: Attention, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(d)) v, one row, head and query at a time, over the keys that are real."""
    rows = []
    for row in range(len(x)):
        keys = [] if module.to_kv is None else list(module.to_kv(x[row]))
        if module.context_to_kv is not None:
            assert context is not None
            real = torch.ones(context.shape[1], dtype=torch.bool) if mask is None else mask[row]
            keys += list(module.context_to_kv(context[row][real]))
        kv_width = module.num_kv_heads * HEAD_DIM
        heads = []
        for head in range(HEADS):
            start = 0 if module.num_kv_heads == 1 else head * HEAD_DIM
            k = [key[start : start + HEAD_DIM] for key in keys]
            v = [key[kv_width + start : kv_width + start + HEAD_DIM] for key in keys]
            if module.null_kv is not None:
                k, v = [module.null_kv[0], *k], [module.null_kv[1], *v]
            q = module.to_q(x[row])[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
            scores = q @ torch.stack(k).T / HEAD_DIM**0.5
            weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
            heads.append(weights @ torch.stack(v))
        rows.append(torch.cat(heads, dim=-1))
    return module.to_out(torch.stack(rows))


@pytest.mark.parametrize("kind", ["self", "cross", "fused"])
@pytest.mark.parametrize("options", [{}, {"null_kv": True}, {"num_kv_heads": 1, "bias": False, "context_bias": True}])
def test_attention_is_a_softmax_over_the_real_keys(kind: str, options: dict[str, object]):
    module = attention(kind, **options)
    x = normal(2, 7, DIM)
    context, mask = (
        (None, None) if kind == "self" else (normal(2, 5, CONTEXT, seed=1), torch.arange(5) < torch.tensor([[2], [5]]))
    )
    torch.testing.assert_close(module(x, context, mask), by_formula(module, x, context, mask), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["cross", "fused"])
def test_masked_tokens_do_not_matter(kind: str):
    module, x, context = attention(kind), normal(1, 4, DIM), normal(1, 6, CONTEXT, seed=1)
    mask = torch.tensor([[True, True, True, False, False, False]])
    other = context.clone()
    other[:, 3:] = 1e6
    torch.testing.assert_close(module(x, context, mask), module(x, other, mask))
    torch.testing.assert_close(module(x, context, mask), module(x, context[:, :3], mask[:, :3]))


def test_keys_may_come_from_elsewhere_than_the_queries():
    module, x, keys = attention("self"), normal(1, 4, DIM), normal(1, 4, DIM, seed=1)
    swapped = [3, 1, 0, 2]
    torch.testing.assert_close(module(x, keys_from=keys), module(x, keys_from=keys[:, swapped]))  # a set of keys
    torch.testing.assert_close(module(x, keys_from=keys)[:, swapped], module(x[:, swapped], keys_from=keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cross", "fused"])
@pytest.mark.parametrize("null_kv", [False, True])
def test_a_row_without_any_token_is_finite_in_value_and_gradient(dtype: torch.dtype, kind: str, null_kv: bool):
    module = attention(kind, null_kv=null_kv).to(dtype)
    x, context = (t.to(dtype).requires_grad_() for t in (normal(2, 4, DIM), normal(2, 5, CONTEXT, seed=1)))
    mask = torch.tensor([[False] * 5, [True] * 5])
    result = module(x, context, mask)
    result.float().square().sum().backward()
    assert result.isfinite().all()
    for tensor in (x, context, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert context.grad is not None
    assert not context.grad[0].any()
    assert context.grad[1].any()


def test_a_row_without_any_token_gets_what_is_left():
    x, context, none = normal(1, 4, DIM), normal(1, 5, CONTEXT, seed=1), torch.zeros(1, 5, dtype=torch.bool)
    cross = attention("cross")
    torch.testing.assert_close(cross(x, context, none), cross.to_out.bias.expand(1, 4, DIM))
    with_null = attention("cross", null_kv=True)
    assert with_null.null_kv is not None
    torch.testing.assert_close(
        with_null(x, context, none), with_null.to_out(with_null.null_kv[1].repeat(HEADS)).expand(1, 4, DIM)
    )
    fused = attention("fused")
    alone = attention("self")
    alone.load_state_dict(fused.state_dict(), strict=False)
    torch.testing.assert_close(fused(x, context, none), alone(x))


def test_gradients_are_those_of_finite_differences():
    module, mask = attention("cross"), torch.tensor([[False] * 3, [True, True, False]])
    x, context = normal(2, 3, DIM).requires_grad_(), normal(2, 3, CONTEXT, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: module(a, b, mask), (x, context))


def test_cosine_attention_does_not_see_the_length_of_queries_and_keys():
    module, x = attention("self", qk_norm=True, bias=False), normal(1, 4, DIM)
    before = module(x)
    with torch.no_grad():
        module.to_q.weight.mul_(50)
    torch.testing.assert_close(module(x), before)


@pytest.mark.parametrize("kind", ["self", "cross", "fused"])
def test_linear_attention_is_softmax_over_features_times_softmax_over_the_real_keys(kind: str):
    module, x = attention(kind, linear=True, bias=False), normal(1, 7, DIM)
    context, mask = normal(1, 5, CONTEXT, seed=1), torch.arange(5)[None] < 3
    keys = [] if module.to_kv is None else [module.to_kv(x[0])]
    if module.context_to_kv is not None:
        keys.append(module.context_to_kv(context[0, :3]))
    k, v = torch.cat(keys).unflatten(-1, (2, HEADS, HEAD_DIM)).unbind(1)  # (m, heads, d)
    q = module.to_q(x[0]).unflatten(-1, (HEADS, HEAD_DIM)).softmax(dim=-1) / HEAD_DIM**0.5
    weights = torch.einsum("nhd,mhd->hnm", q, k.softmax(dim=0))
    expected = module.to_out(torch.einsum("hnm,mhd->nhd", weights, v).flatten(1))
    found = module(x, None if kind == "self" else context, None if kind == "self" else mask)
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["self", "cross", "fused"])
def test_attention_over_pixels_starts_as_the_identity(kind: str):
    module = PixelAttention(32, kind=kind, head_dim=16, context_dim=CONTEXT)  # type: ignore[arg-type]
    x, context = normal(2, 32, 4, 6).float(), normal(2, 5, CONTEXT).float()
    assert torch.equal(module(x, context, None), x)


def test_stacked_attention_starts_as_the_identity_and_reads_the_text():
    module = StackedAttention(32, head_dim=16, context_dim=CONTEXT)
    x, context = normal(1, 32, 4, 4).float(), normal(1, 5, CONTEXT).float()
    assert torch.equal(module(x, context, None), x)
    random_weights(module)
    assert not torch.allclose(module(x, context, None), module(x, -context, None))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PixelAttention(32, kind="fused", head_dim=16, context_dim=CONTEXT),
        lambda: StackedAttention(32, head_dim=16, context_dim=CONTEXT),
    ],
)
def test_memory_layout_and_autocast_do_not_change_the_result(make):
    module, x, context = random_weights(make()), normal(2, 32, 4, 6).float(), normal(2, 5, CONTEXT).float()
    mask = torch.arange(5) < torch.tensor([[2], [4]])
    plain = module(x, context, mask)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last), context, mask), plain)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x, context, mask)
    assert (half - plain).norm() < 0.02 * plain.norm()


def test_pixels_are_tokens_in_reading_order():
    x = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    tokens = flatten_pixels(x)
    assert tokens[1, 2].tolist() == x[1, :, 1, 0].tolist()
    assert torch.equal(unflatten_pixels(tokens, x), x)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="cross attention needs context_dim"):
        Attention(8, kind="cross", num_heads=1, head_dim=8)
    with pytest.raises(ValueError, match="40 channels are not a multiple of head_dim 16"):
        PixelAttention(40, kind="self", head_dim=16, num_groups=8)
