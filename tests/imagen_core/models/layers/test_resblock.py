"""The residual block: silent at the start, then the formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.layers.context import Context
from imagen_core.models.layers.resblock import RepeatConv, ResBlock, StandardizedConv2d, resample
from tests.imagen_core.models.small import random_weights

TIME = 16


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block(in_channels: int = 32, out_channels: int = 32, **options) -> ResBlock:
    return ResBlock(in_channels, out_channels, TIME, **options).double()


def context() -> Context:
    return Context(normal(2, TIME), None, None)


def by_formula(b: ResBlock, x: Tensor, time: Tensor, groups: int = 32) -> Tensor:
    weights = dict(b.named_parameters())
    h = F.silu(F.group_norm(x, groups, weights["norm1.weight"], weights["norm1.bias"]))
    h = F.conv2d(h, b.conv1.weight, b.conv1.bias, padding=1)
    scale, shift = (F.linear(time, b.time.weight, b.time.bias)[..., None, None]).chunk(2, dim=1)
    h = F.group_norm(h, groups, weights["norm2.weight"], weights["norm2.bias"]) * (1 + scale) + shift
    return F.conv2d(F.silu(h), b.conv2.weight, b.conv2.bias, padding=1)


def test_a_new_block_is_its_skip_branch():
    x = normal(2, 32, 4, 4)
    assert torch.equal(block()(x, context()), x)
    wider = block(32, 64)
    torch.testing.assert_close(wider(x, context()), wider.skip(x))
    scaled = block(always_project_skip=True, skip_scale=0.5**0.5)
    assert isinstance(scaled.skip, nn.Conv2d)
    torch.testing.assert_close(scaled(x, context()), scaled.skip(x) / 2**0.5)


@pytest.mark.parametrize("groups", [8, 32])
def test_norm_silu_conv_twice_with_scale_and_shift_on_the_second_norm(groups: int):
    b, x = random_weights(block(32, 64, num_groups=groups)), normal(2, 32, 4, 4)
    expected = by_formula(b, x, context().time, groups) + b.skip(x)
    torch.testing.assert_close(b(x, context()), expected, rtol=1e-10, atol=1e-12)


def test_gelu_takes_the_place_of_silu_and_the_sum_of_both_branches_is_divided():
    b, x = random_weights(block(activation="gelu", divisor=2.5)), normal(2, 32, 4, 4)
    h = b.conv1(F.gelu(b.norm1(x)))
    scale, shift = b.time(context().time)[..., None, None].chunk(2, dim=1)
    expected = (b.conv2(F.gelu(b.norm2(h) * (1 + scale) + shift)) + x) / 2.5
    torch.testing.assert_close(b(x, context()), expected)


def test_without_scale_shift_the_time_is_added_before_the_second_norm():
    b, x = random_weights(block(scale_shift=False)), normal(2, 32, 4, 4)
    h = b.conv1(F.silu(b.norm1(x))) + b.time(context().time)[..., None, None]
    torch.testing.assert_close(b(x, context()), b.conv2(F.silu(b.norm2(h))) + x)


@pytest.mark.parametrize("how", ["down", "up"])
def test_both_branches_change_resolution(how: str):
    new, x = block(resample=how), normal(2, 32, 4, 4)
    assert torch.equal(new(x, context()), resample(x, how))  # type: ignore[arg-type]
    b = random_weights(new)
    h = b.conv1(resample(F.silu(b.norm1(x)), how))  # type: ignore[arg-type]
    scale, shift = b.time(context().time)[..., None, None].chunk(2, dim=1)
    expected = b.conv2(F.silu(b.norm2(h) * (1 + scale) + shift)) + resample(x, how)  # type: ignore[arg-type]
    torch.testing.assert_close(b(x, context()), expected)


def test_resample_averages_or_repeats():
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[None, None]
    assert resample(x, "down").item() == 4.0
    assert resample(x, "up")[0, 0].tolist() == [[1, 1, 3, 3], [1, 1, 3, 3], [5, 5, 7, 7], [5, 5, 7, 7]]


def test_repeat_conv_doubles_the_sides():
    layer = RepeatConv(32, 64)
    x = normal(1, 32, 3, 3).float()
    torch.testing.assert_close(layer(x), layer.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)))


def test_dropout_works_in_training_only():
    b, x = random_weights(block(dropout=0.5)), normal(2, 32, 4, 4)
    torch.manual_seed(0)
    assert not torch.equal(b(x, context()), b(x, context()))
    b.eval()
    assert torch.equal(b(x, context()), b(x, context()))


def test_gate_and_attention_have_their_places():
    """Attention between the convolutions, the gate at the end of the branch, neither on the skip."""

    class Double(nn.Module):
        def forward(self, h: Tensor, conditions: Context) -> Tensor:
            assert conditions.time.shape == (2, TIME)
            return 2 * h

    b = random_weights(block(text_attention=Double(), gate=nn.Threshold(0.0, 0.0)))
    plain = random_weights(block())
    plain.load_state_dict(b.state_dict())
    x = normal(2, 32, 4, 4)
    with torch.no_grad():
        for parameter in plain.conv1.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(b(x, context()), (plain(x, context()) - x).clamp(min=0) + x)


def test_memory_layout_does_not_change_the_result():
    b, x = random_weights(block(32, 64)), normal(2, 32, 4, 6)
    strided = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(b(strided, context()), b(x, context()))
    b = b.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert b(strided, context()).is_contiguous(memory_format=torch.channels_last)


def test_standardised_weights_have_mean_0_and_variance_1_for_each_output_channel():
    conv = StandardizedConv2d(4, 3, 3, padding=1).double()
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = conv.weight.detach().flatten(1)
    weight = (flat - flat.mean(dim=1, keepdim=True)) / (flat.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = F.conv2d(x, weight.view_as(conv.weight), conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)
