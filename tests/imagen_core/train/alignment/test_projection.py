"""The alignment against closed forms, on grids of other sizes, and what tokens and blocks it reads."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.diffusion import DenoiserConfig
from imagen_core.train import TrainError
from imagen_core.train.alignment.config import AlignmentConfig
from imagen_core.train.alignment.projection import Alignment, aligned_block, hidden_width, resized_features
from tests.imagen_core.models.small import inputs, transformer
from tests.imagen_core.train.small import BASE


def aligned(net: nn.Module, width: int, dim: int, **settings: Any) -> Alignment:
    torch.manual_seed(0)
    config = AlignmentConfig.model_validate({"encoder": "dino", "block": 1, "hidden_dim": 7, **settings})
    return Alignment(config, net, width, dim)


def run(net: nn.Module) -> tuple[Tensor, Tensor]:
    """A pass of the transformer; its input, and the output of its first block."""
    kept: list[Tensor] = []
    handle = net.get_submodule("blocks.0").register_forward_hook(lambda _m, _i, output: kept.append(output))
    x, c_noise, conditioning = inputs(net.config, lengths=(6, 6))  # type: ignore[arg-type]
    net(x, c_noise, conditioning)
    handle.remove()
    return x, kept[0]


@pytest.mark.parametrize("time", ["adaptive", "token"])
def test_the_mean_cosine_of_the_projected_patches_is_the_closed_form(time: str) -> None:
    net = transformer(time=time).build()
    alignment = aligned(net, net.config.dim, 5)
    x, hidden = run(net)
    rows, columns = (side // net.config.patch_px for side in x.shape[2:])
    features = torch.randn(2, rows, columns, 5)
    found = alignment((x.shape[2], x.shape[3]), features).tolist()
    w = [(p.weight.double(), p.bias.double()) for p in alignment.projector if isinstance(p, nn.Linear)]  # type: ignore[union-attr]
    assert len(w) == 3
    for row in range(2):
        cosines = []
        for place in range(rows * columns):
            h = hidden[row, hidden.shape[1] - rows * columns + place].double()
            for number, (weight, bias) in enumerate(w):
                h = weight @ h + bias
                h = h * torch.sigmoid(h) if number < 2 else h
            target = features[row, place // columns, place % columns].double()
            cosines.append(float((h @ target / (h.norm() * target.norm())).detach()))
        assert found[row] == pytest.approx(math.fsum(cosines) / len(cosines), abs=1e-5)


def test_a_convolution_of_three_by_three_patches_projects_too() -> None:
    net = transformer().build()
    alignment = aligned(net, net.config.dim, 5, projection="conv")
    x, hidden = run(net)
    rows, columns = (side // net.config.patch_px for side in x.shape[2:])
    features = torch.randn(2, rows, columns, 5)
    grid = hidden.reshape(2, rows, columns, -1).permute(0, 3, 1, 2)
    conv = alignment.projector
    assert isinstance(conv, nn.Conv2d)
    expected = F.cosine_similarity(
        F.conv2d(grid, conv.weight, conv.bias, padding=1), features.permute(0, 3, 1, 2), dim=1
    )
    torch.testing.assert_close(alignment((x.shape[2], x.shape[3]), features), expected.mean(dim=(1, 2)))


def test_features_of_what_is_projected_have_cosine_one_and_their_opposites_minus_one() -> None:
    net = transformer().build()
    alignment = aligned(net, net.config.dim, 5)
    for sign in (1, -1):
        x, hidden = run(net)
        rows, columns = (side // net.config.patch_px for side in x.shape[2:])
        features = sign * 3 * alignment.projector(hidden).reshape(2, rows, columns, 5).detach()
        torch.testing.assert_close(alignment((x.shape[2], x.shape[3]), features), torch.full((2,), float(sign)))


def test_without_features_all_gradients_are_zero_and_reach_the_projector_alone() -> None:
    net = transformer().build()
    alignment = aligned(net, net.config.dim, 5)
    x, _ = run(net)
    result = alignment((x.shape[2], x.shape[3]), None)
    assert result.tolist() == [0.0, 0.0]
    result.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in alignment.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_other_grids_are_interpolated() -> None:
    ramp = torch.arange(4.0).expand(4, 4)[None, ..., None]  # grows along the columns
    smaller = resized_features(ramp, (2, 2), None)[0, 0]
    torch.testing.assert_close(smaller.sum(dim=1), torch.full((2,), 3.0))  # symmetric about the middle
    assert (smaller[:, 0] < smaller[:, 1]).all()
    larger = resized_features(ramp, (8, 6), None)
    assert larger.shape == (1, 1, 8, 6)
    assert (larger.diff(dim=3) >= 0).all()
    assert (larger.diff(dim=2) == 0).all()
    assert torch.equal(resized_features(ramp, (4, 4), None), ramp.permute(0, 3, 1, 2))


def test_spatial_norm_subtracts_a_part_of_the_mean_and_divides_by_the_deviation() -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + 7
    for part in (0.0, 0.6, 1.0):
        found = resized_features(features, (3, 4), part).permute(0, 2, 3, 1)
        flat = features.reshape(2, 12, 5)
        mean, deviation = flat.mean(dim=1), ((flat - flat.mean(dim=1, keepdim=True)) ** 2).mean(dim=1).sqrt()
        expected = (features - part * mean[:, None, None]) / deviation[:, None, None]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_width_of_a_block_is_that_of_its_output() -> None:
    unet = DenoiserConfig.model_validate(BASE | {"unet": BASE["unet"] | {"channel_mult": [1, 3]}})  # type: ignore[operator]
    assert hidden_width(unet, "down.0.blocks.0") == 32
    assert hidden_width(unet, "middle.1") == 96
    assert hidden_width(DenoiserConfig(unet=transformer(), size_px=16), 1) == transformer().dim


def test_a_number_counts_the_blocks_of_a_transformer_from_one() -> None:
    net = transformer().build()
    assert aligned_block(net, 1) == ("blocks.0", net.blocks[0])
    assert aligned_block(net, "blocks.1")[1] is net.blocks[1]
    with pytest.raises(TrainError, match=r"alignment\.block: 'inputs' is no block"):
        aligned_block(net, "inputs")
