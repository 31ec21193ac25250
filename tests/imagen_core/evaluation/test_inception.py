"""FID's Inception network: its size, its names, and where it differs from torchvision's."""

import pytest
import torch
import torch.nn.functional as F

from imagen_core.evaluation.inception import FidInception


@pytest.fixture(scope="module")
def network() -> FidInception:
    torch.manual_seed(0)
    network = FidInception().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return network.requires_grad_(False)


def test_the_network_of_fid_has_the_parameters_of_inception_v3_with_1008_classes(network: FidInception) -> None:
    """torchvision's, without the auxiliary classifier and with 1,000 classes, has 23,834,568."""
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * (2048 + 1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)),
        ("Conv2d_4a_3x3.bn.running_var", (192,)),
        ("Mixed_5b.branch5x5_2.conv.weight", (64, 48, 5, 5)),
        ("Mixed_5d.branch_pool.conv.weight", (64, 288, 1, 1)),
        ("Mixed_6a.branch3x3dbl_3.conv.weight", (96, 96, 3, 3)),
        ("Mixed_6c.branch7x7dbl_5.conv.weight", (192, 160, 1, 7)),
        ("Mixed_7a.branch7x7x3_3.conv.weight", (192, 192, 7, 1)),
        ("Mixed_7c.branch3x3dbl_3b.conv.weight", (384, 384, 3, 1)),
        ("fc.weight", (1008, 2048)),
    ],
)
def test_weights_have_torchvisions_names(network: FidInception, name: str, shape: tuple[int, ...]) -> None:
    assert network.state_dict()[name].shape == shape


def pool_branch(network: FidInception, block: str, x: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The last channels of a block's output, and its pool's convolution of `pooled`."""
    module = network.get_submodule(block)
    expected = module.get_submodule("branch_pool")(pooled)
    return module(x)[:, -expected.shape[1] :], expected


def test_average_pools_leave_out_the_padding(network: FidInception) -> None:
    x = torch.randn(1, 192, 6, 6)
    padded = F.pad(x, (1, 1, 1, 1), value=torch.nan).unfold(2, 3, 1).unfold(3, 3, 1)
    pooled = padded.flatten(-2).nanmean(dim=-1)
    torch.testing.assert_close(*pool_branch(network, "Mixed_5b", x, pooled))


def test_the_last_pool_takes_the_maximum_and_the_one_before_it_the_mean(network: FidInception) -> None:
    for block, channels in (("Mixed_7c", 2048), ("Mixed_7b", 1280)):
        x = torch.randn(1, channels, 3, 3)
        found, of_maximum = pool_branch(network, block, x, F.max_pool2d(x, 3, stride=1, padding=1))
        assert torch.allclose(found, of_maximum) == (block == "Mixed_7c")


def test_features_do_not_depend_on_the_batch_and_logits_have_no_bias(network: FidInception) -> None:
    images = torch.rand(2, 3, 80, 80) * 2 - 1
    features, logits = network(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    torch.testing.assert_close(network(images[1:])[0], features[1:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits, features @ network.fc.weight.T)
    assert features.std() > 0


def test_weights_that_do_not_fit_are_named(network: FidInception) -> None:
    weights = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    FidInception.of(weights)
    for change, words in (
        ({"fc.bias": None}, r"lacks 1 weights .* \(fc.bias"),
        ({"AuxLogits.fc.bias": torch.zeros(1)}, r"has unknown 1 weights .* \(AuxLogits"),
        ({"fc.weight": torch.zeros(1000, 2048)}, r"has other shapes of 1 weights .* \(fc.weight"),
    ):
        changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=words):
            FidInception.of(changed)
