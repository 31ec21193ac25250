"""LPIPS against its formula written out, and the networks against their published sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_core.evaluation.lpips import Lpips


@pytest.fixture(scope="module", params=["alex", "vgg"])
def network(request: pytest.FixtureRequest) -> Lpips:
    torch.manual_seed(0)
    made = Lpips(request.param).double().eval().requires_grad_(False)
    for number in range(5):
        made.get_submodule(f"lin{number}").weight.abs_()  # as in the published weights
    return made


def pairs(side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 3, 3, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    return a, b


@pytest.mark.parametrize(("name", "size"), [("alex", 2_469_696), ("vgg", 14_714_688)])
def test_the_networks_have_their_published_sizes(name: str, size: int) -> None:
    assert sum(p.numel() for p in Lpips(name).features.parameters()) == size


def test_lpips_is_the_formula_of_the_paper(network: Lpips) -> None:
    a, b = pairs()
    weights = network.state_dict()
    names = [name for name in weights if name.startswith("features") and name.endswith("weight")]
    alex = len(names) == 5
    outputs = names if alex else [f"features.{n}.weight" for n in (2, 7, 14, 21, 28)]  # of which the distance is
    pools = {"features.3.weight", "features.6.weight"} if alex else {f"features.{n}.weight" for n in (5, 10, 17, 24)}

    def maps(x: Tensor) -> list[Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).double().view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).double().view(3, 1, 1)
        found = []
        for name in names:
            if name in pools:
                x = F.max_pool2d(x, 3, 2) if alex else F.max_pool2d(x, 2)
            kernel = weights[name].shape[-1]
            stride, padding = (4, 2) if kernel == 11 else (1, kernel // 2)
            x = F.conv2d(x, weights[name], weights[name.replace("weight", "bias")], stride, padding).relu()
            if name in outputs:
                found.append(F.normalize(x, dim=1))
        return found

    expected = torch.zeros(3, dtype=torch.float64)
    for number, (left, right) in enumerate(zip(maps(a), maps(b), strict=True)):
        per_place = torch.einsum("bchw,c->bhw", (left - right).square(), weights[f"lin{number}.weight"].flatten())
        expected += per_place.mean(dim=(1, 2))
    found = network(a, b)
    assert found.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_equal_images_have_distance_0_and_order_does_not_matter(network: Lpips) -> None:
    a, b = pairs()
    assert network(a, a).tolist() == [0, 0, 0]
    torch.testing.assert_close(network(a, b), network(b, a))
    torch.testing.assert_close(network(a[1:], b[1:]), network(a, b)[1:])


def test_lpips_takes_weights_by_their_published_names_and_names_those_that_do_not_fit(network: Lpips) -> None:
    published = {
        name.replace(".weight", ".model.1.weight") if name.startswith("lin") else name: value.clone()
        for name, value in network.state_dict().items()
    }
    published["classifier.6.weight"] = torch.zeros(1000, 8)
    a, b = (side.float() for side in pairs())
    torch.testing.assert_close(
        Lpips.of(published)(a, b), network(a.double(), b.double()).float(), rtol=1e-3, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"1 weights are missing, unknown or of another shape \(lin4.weight\)"):
        Lpips.of({name: value for name, value in published.items() if not name.startswith("lin4")})


def test_images_smaller_than_its_layers_are_refused(network: Lpips) -> None:
    alex = len(network.state_dict()) == 15
    least = 31 if alex else 16
    assert network(*pairs(least)).shape == (3,)
    with pytest.raises(ValueError, match=rf"images of {least - 1} x {least - 1} px; this network needs {least}"):
        network(*pairs(least - 1))
