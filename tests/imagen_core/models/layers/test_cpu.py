"""What a CPU computes in other steps than PyTorch's own: the same numbers and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.layers import cpu


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_scaled_unit_has_the_values_and_gradients_of_its_formula(order: tuple[int, int, int]) -> None:
    x, gain, grad = normal(5, 7, 12).permute(order), normal(12, seed=1), normal(5, 7, 12, seed=2).permute(order)
    x[0, 0] = 0
    leaves = [t.clone().requires_grad_() for t in (x, gain)]
    exact = [t.double().requires_grad_() for t in (x, gain)]
    result = cpu.scaled_unit(*leaves)
    assert "ScaledUnit" in type(result.grad_fn).__name__
    formula = F.normalize(exact[0], dim=-1) * exact[1]
    torch.testing.assert_close(result, formula.float())
    result.backward(grad)
    formula.backward(grad.double())
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(leaf.grad, reference.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(cpu, "_mkl_lacks_avx512", lambda: True)
    torch.manual_seed(0)
    layers = nn.Conv2d(6, 10, 1), nn.SiLU(), nn.Conv2d(10, 8, 1, bias=False), nn.Flatten(2), nn.Linear(64, 5)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_with_onednn_a_model_has_the_same_values_gradients_and_names(
    model: nn.Sequential, memory_format: torch.memory_format
) -> None:
    fast = copy.deepcopy(model)
    cpu.use_onednn(fast)
    x = normal(8, 6, 8, 8).contiguous(memory_format=memory_format)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((model, fast), inputs, strict=True)]
    assert "Product" in str(outputs[1].grad_fn.next_functions[0][0].name())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-5)
    assert fast.state_dict().keys() == model.state_dict().keys()
    for p, q in zip(model.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-4)


def test_other_precisions_and_copies_compute_as_ever(model: nn.Sequential) -> None:
    fast = copy.deepcopy(model)
    cpu.use_onednn(fast)
    x = normal(8, 6, 8, 8)
    assert torch.equal(copy.deepcopy(fast).double()(x.double()), copy.deepcopy(model).double()(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), model(x))
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any()
    assert fast(x).any()


def test_where_mkl_is_as_fast_nothing_changes(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_mkl_lacks_avx512", lambda: False)
    cpu.use_onednn(model)
    assert not any("forward" in vars(module) for module in model.modules())
