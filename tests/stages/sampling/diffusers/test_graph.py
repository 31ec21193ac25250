"""A network as a list of operations computes what the network itself does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from imagen_core.cascade import CascadeStage
from imagen_core.models import Conditioning
from stages.sampling.diffusers.graph import NetworkGraph, trace
from tests.stages.sampling.diffusers.models import DISCRETE, EFFICIENT, HYBRID, REGULAR, SUPER, TRANSFORMER, stage

pytestmark = pytest.mark.slow  # diffusers takes seconds to import

STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "efficient, super-resolution": (EFFICIENT | SUPER, {"low_res_px": 8, "low_res_noise": {"kind": "lognormal"}}),
    "efficient, no tokens when dropped": (EFFICIENT | {"dropped_caption": "no_tokens", "null_token": True}, {}),
    "regular, eps": (REGULAR, {"diffusion": DISCRETE}),
    "regular, padded": (REGULAR | {"padded_tokens": 12, "pooling": "mean", "attention_type": "stacked"}, {}),
    "regular, learned variance and classes": (
        REGULAR | {"out_channels": 6, "num_classes": 5, "text_dim": None, "attention_type": "self"},
        {"diffusion": DISCRETE | {"variance": "learned_range"}},
    ),
    "regular, previous state": (REGULAR, {"diffusion": DISCRETE | {"objective": "prev"}}),
    "regular, layers of an encoder": (REGULAR | {"num_text_layers": 3}, {}),
    "hybrid": (HYBRID, {}),
    "hybrid, super-resolution": (
        HYBRID | SUPER | {"memory_efficient": True, "combine_up_features": True, "init_residual": True},
        {"low_res_px": 8, "low_res_noise": {"kind": "uniform"}, "diffusion": {"objective": "v"}},
    ),
    "transformer": (TRANSFORMER | {"size_vector": True, "position_scaling": "area"}, {}),
    "transformer, cross attention, one modulation, super-resolution": (
        TRANSFORMER | SUPER | {"attention_type": "cross", "time": "shared"},
        {"low_res_px": 8, "low_res_noise": {"kind": "uniform"}},
    ),
    "transformer, classes as tokens": (
        TRANSFORMER
        | {"text_dim": None, "attention_type": "self", "num_classes": 5, "num_class_tokens": 2, "time": "token"}
        | {"fixed_positions": True, "class_tokens_from": 1},
        {"diffusion": DISCRETE},
    ),
}


def network(graph: NetworkGraph) -> Any:
    """The exported file's network with the traced tensors."""
    from stages.sampling.diffusers.files.network import Network

    built = Network(
        graph=graph.lines,
        inputs=graph.inputs,
        outputs=graph.outputs,
        tensors={name: list(tensor.shape) for name, tensor in graph.tensors.items()},
        buffers={name: str(graph.tensors[name].dtype).removeprefix("torch.") for name in graph.constants},
        sampling={},
    )
    built.load_state_dict(graph.tensors)
    return built


def inputs(
    of: CascadeStage, batch: int, tokens: int, height: int, width: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(batch)
    unet = of.config.unet
    x = torch.randn(batch, 3, height, width, generator=generator)
    given: dict[str, Any] = {}
    keep = torch.arange(batch) % 2 == 0
    for text_shape in unet.text_shapes:
        lengths = torch.arange(batch)[:, None] % tokens
        given["text"] = torch.randn(batch, tokens, *text_shape, generator=generator)
        given |= {"text_mask": torch.arange(tokens)[None] <= lengths, "text_keep": keep}
    if unet.num_classes is not None:
        given |= {"labels": torch.arange(batch) % (unet.num_classes + 1) - 1, "labels_keep": keep}
    if unet.low_res:
        given["low_res"] = torch.randn(x.shape, generator=generator)
        given["low_res_noise"] = torch.randn(batch, generator=generator)
    return x, torch.rand(batch, generator=generator) * 3 + 0.1, given


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_the_graph_equals_the_denoiser_for_other_batches_lengths_and_sides(name: str) -> None:
    unet, settings = STAGES[name]
    traced = stage(unet, **settings)
    exported = network(trace(traced))
    for batch, tokens, height, width in ((1, 1, 16, 16), (4, 12, 8, 24), (3, 5, 32, 16)):
        x, sigma, given = inputs(traced, batch, tokens, height, width)
        expected, channels = traced.denoiser.with_variance(x, sigma, Conditioning(**given))
        found, found_channels = exported(x, sigma, **given)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert (channels is None) == (found_channels is None)
        if channels is not None:
            torch.testing.assert_close(found_channels, channels, atol=1e-6, rtol=1e-6)


def test_the_graph_has_the_weights_under_the_names_of_the_checkpoint() -> None:
    traced = stage(EFFICIENT)
    graph = trace(traced)
    state = traced.denoiser.state_dict()
    assert graph.tensors.keys() == state.keys()
    assert all(torch.equal(graph.tensors[name], state[name]) for name in state)
    assert graph.constants == []
    assert any("aten.conv2d.default(" in line and "weights['net.conv_in.weight']" in line for line in graph.lines)


@torch.no_grad()
def test_half_precision_stays_near_the_denoiser() -> None:
    traced = stage(REGULAR, diffusion=DISCRETE)
    exported = network(trace(traced)).to(torch.bfloat16)
    x, sigma, given = inputs(traced, 2, 5, 16, 16)
    expected = traced.denoiser(x, sigma, Conditioning(**given))
    found, _ = exported(x, sigma, **given)
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).abs().mean()) < 0.02 * float(expected.abs().mean())


@pytest.mark.parametrize(
    "line",
    [
        "y = __import__('os').getcwd()",
        "y = x.numpy()",
        "y = operator.attrgetter(x)",
        "y = aten.relu.default(*x)",
        "import os",
    ],
)
def test_a_graph_with_anything_but_operations_is_refused(line: str) -> None:
    from stages.sampling.diffusers.files.network import Network

    with pytest.raises((ValueError, AttributeError), match=r"is no operation of a network"):
        Network(graph=[line], inputs=["x"], outputs=["y"], tensors={}, buffers={}, sampling={})
