"""Models prepared for inference on a CPU compute the same as before, and nothing else is possible with them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.layers.inference import PackedConv2d, PackedLinear, optimize_for_cpu
from imagen_core.models.layers.resblock import StandardizedConv2d
from imagen_core.models.layers.winograd import convolve, packed_kernel
from tests.imagen_core.models.small import efficient, inputs, random_weights, regular, transformer

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def hybrid(**changes: Any) -> HybridUNetConfig:
    options = {
        "image_size_px": 16,
        "dim": 16,
        "dim_mults": (1, 2),
        "num_res_blocks": (1, 1),
        "attention_levels": (False, True),
        "cross_attention_levels": (False, True),
        "text_dim": 12,
    }
    return HybridUNetConfig.model_validate(options | changes)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (16, 16), (5, 7), (1, 13), (40, 64), (66, 30)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_winograds_convolution_equals_the_plain_one(height: int, width: int, batch: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(17, 24, 3, padding=1), torch.randn(batch, 17, height, width)
    kernel, bias = packed_kernel(layer.weight, layer.bias)
    exact = layer.double()(x.double())
    result = convolve(x, kernel, bias)
    assert result.shape == exact.shape
    assert (result - exact).abs().max() < 3e-5


@torch.no_grad()
def test_winograds_convolution_without_bias() -> None:
    layer, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.randn(2, 8, 9, 8)
    assert (convolve(x, *packed_kernel(layer.weight, None)) - layer(x)).abs().max() < 3e-5


MODELS: dict[str, Any] = {
    "regular": regular(),
    "regular, wide": regular(embed_dim=128, channel_mult=(1, 1), head_dim=32),
    "regular, of IF": regular(
        resblock_updown=True, activation="gelu", pooling="multihead", pooling_heads=4, shared_norm=True
    ),
    "regular, stacked": regular(attention_type="stacked", padded_tokens=8, pooling="mean", cond_dim=32),
    "efficient, wide": efficient(embed_dim=128, channel_mult=(1, 1), low_res=True, low_res_noise=True),
    "hybrid": hybrid(),
    "hybrid, wide": hybrid(norm="rms", qk_norm=True, dim=64),
    "hybrid, of DALLE2-pytorch": hybrid(
        res_block="conv_first", weight_standardization=True, conditions_in="other_blocks"
    ),
    "hybrid, memory-efficient": hybrid(
        memory_efficient=True, init_residual=True, combine_up_features=True, attention_levels=(False, "linear")
    ),
    "transformer": transformer(),
    "transformer, cross": transformer(attention_type="cross", time="token", bottleneck_dim=None),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sides", [(16, 16), (32, 20)])
@torch.no_grad()
def test_every_family_computes_the_same(name: str, sides: tuple[int, int]) -> None:
    config = MODELS[name]
    model = random_weights(config.build()).eval()
    _, c_noise, conditioning = inputs(config, lengths=(3, 5, 1))
    shape = (3, config.in_channels, *sides)
    x = torch.randn(shape)
    if config.low_res:
        conditioning = replace(conditioning, low_res=torch.randn(shape))
    expected = model(x, c_noise, conditioning)
    optimize_for_cpu(model)
    found = [model(x, c_noise, conditioning) for _ in range(2)]
    assert torch.equal(*found)
    assert (found[0] - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)


@torch.no_grad()
def test_batches_of_other_shapes_are_as_right_as_the_first() -> None:
    layer = nn.Sequential(nn.Conv2d(128, 160, 3, padding=1))
    images = [torch.randn(shape) for shape in ((8, 128, 16, 16), (1, 128, 16, 16), (1, 128, 5, 9), (2, 128, 24, 40))]
    expected = [layer(x) for x in images]
    optimize_for_cpu(layer)
    for x, plain in zip(images, expected, strict=True):
        assert (layer(x) - plain).abs().max() < 1e-4
    assert layer[0].uses_winograd


@pytest.mark.parametrize(
    ("layer", "shape", "room", "uses"),
    [
        (nn.Conv2d(128, 128, 3, padding=1), (2, 128, 32, 32), 2**22, True),
        (nn.Conv2d(128, 128, 3, padding=1), (2, 128, 32, 32), 2**20, False),  # no room for its weights
        (nn.Conv2d(128, 128, 3, padding=1), (2, 128, 16, 16), 2**22, False),  # too few tiles
        (nn.Conv2d(128, 96, 3, padding=1), (2, 128, 32, 32), 2**22, False),  # too narrow
        (nn.Conv2d(128, 128, 3, padding=1, stride=2), (2, 128, 64, 64), 2**22, False),
        (nn.Conv2d(128, 128, 1), (2, 128, 32, 32), 2**22, False),
        (StandardizedConv2d(128, 128, 3, padding=1), (2, 128, 32, 32), 2**22, True),
    ],
)
@torch.no_grad()
def test_winograd_is_for_wide_convolutions_of_many_pixels(
    layer: nn.Conv2d, shape: tuple[int, ...], room: int, uses: bool
) -> None:
    model, x = nn.Sequential(layer), torch.randn(shape)
    expected = model(x)
    optimize_for_cpu(model, winograd_bytes=room)
    assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model[0].uses_winograd is uses


def test_only_plain_layers_in_float32_are_replaced() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleList(
        [
            nn.Linear(2, 2),
            nn.Conv2d(2, 2, 3),
            Doubled(2, 2),
            nn.Linear(2, 2).double(),
            nn.Linear(2, 2).bfloat16(),
            nn.Conv2d(2, 2, 3, groups=2),
            nn.Conv2d(2, 2, 3, padding="same"),
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            nn.ConvTranspose2d(2, 2, 4),
        ]
    )
    kinds = [type(layer) for layer in model]
    optimize_for_cpu(model)
    assert [type(layer) for layer in model] == [PackedLinear, PackedConv2d, *kinds[2:]]


def test_it_cannot_be_saved_cast_or_moved() -> None:
    model = regular().build()
    optimize_for_cpu(model)
    model.to("cpu", torch.float32)
    with pytest.raises(RuntimeError, match="cannot be saved; load it again"):
        model.state_dict()
    with pytest.raises(RuntimeError, match=r"stays in float32 on the CPU \(asked for torch.bfloat16 on cpu\)"):
        model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"asked for torch\.float32 on meta"):
        model.to("meta")
