"""A denoiser as the list of torch operations that it runs, and its tensors by name."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from imagen_core.cascade import CascadeStage
from imagen_core.diffusion import Denoiser
from imagen_core.models.conditioning.base import Conditioning

_LABELS = ("labels", "labels_keep")
_TEXT = ("text", "text_mask", "text_keep")


@dataclass(frozen=True, slots=True)
class NetworkGraph:
    """What `files/network.py` runs.

    Attributes:
        lines: one operation each, in their order.
        inputs: names of the inputs; they are arguments of `Conditioning`, but for x and sigma.
        outputs: names of the results.
        tensors: parameters and constants on the CPU; the parameters under the names of the checkpoint.
        constants: names of those that are no parameters.
    """

    lines: list[str]
    inputs: list[str]
    outputs: list[str]
    tensors: dict[str, Tensor]
    constants: list[str]


class _Inputs(nn.Module):
    """The denoiser as a function of tensors."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, given: dict[str, Any]) -> list[Tensor]:
        estimate, channels = self.denoiser.with_variance(x, sigma, Conditioning(**given))
        return [estimate] if channels is None else [estimate, channels]


def trace(stage: CascadeStage) -> NetworkGraph:
    """The denoiser's operations for images of any number and sides, and captions of any length.

    Raises:
        ValueError: it does not run for all shapes, or has an operation that the graph's file does not know.
    """
    denoiser = stage.denoiser.to("cpu", torch.float32).eval()
    given, sizes = _arguments(stage)
    first = ("x", "sigma")
    arguments = (*(given.pop(name) for name in first), given)
    shapes = (*(sizes.pop(name) for name in first), sizes)
    try:
        with torch.no_grad():
            program = export(_Inputs(denoiser), arguments, dynamic_shapes=shapes, strict=False)
    except UserError as error:
        raise ValueError(f"the network cannot be traced for all shapes: {str(error).splitlines()[0]}") from error
    return _read(program, {name: name for name in first} | {f"given_{name}": name for name in given})


def _arguments(stage: CascadeStage) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Example inputs, and which of their sizes may differ; no two of these are equal, or they would stay equal."""
    config, divisor = stage.config, stage.config.unet.sides_divisor
    batch, tokens = 3, 5
    height, width = Dim("height", min=1) * divisor, Dim("width", min=1) * divisor
    image, row = {0: Dim.DYNAMIC, 2: height, 3: width}, {0: Dim.DYNAMIC}
    x = torch.zeros(batch, config.shape[0], config.size_px, config.size_px + divisor)
    arguments, sizes = {"x": x, "sigma": torch.ones(batch)}, {"x": image, "sigma": row}
    for text_shape in config.unet.text_shapes:  # of one encoder
        text = torch.zeros(batch, tokens, *text_shape), torch.ones(batch, tokens, dtype=torch.bool)
        arguments |= dict(zip(_TEXT, (*text, torch.ones(batch, dtype=torch.bool)), strict=True))
        token = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        sizes |= {"text": token, "text_mask": token, "text_keep": row}
    if config.unet.needs_empty_caption:  # takes the place of the caption, whichever the pipeline gives
        del arguments["text_keep"], sizes["text_keep"]
    if config.unet.num_classes is not None:
        arguments |= dict(zip(_LABELS, (torch.zeros(batch).long(), torch.ones(batch, dtype=torch.bool)), strict=True))
        sizes |= dict.fromkeys(_LABELS, row)
    if config.low_res_px is not None:
        arguments["low_res"], sizes["low_res"] = torch.zeros_like(x), image
    if config.unet.low_res_noise:
        arguments["low_res_noise"], sizes["low_res_noise"] = torch.ones(batch), row
    return arguments, sizes


def _read(program: ExportedProgram, inputs: dict[str, str]) -> NetworkGraph:
    """Args: inputs: the name of each input by that of its placeholder."""
    names, tensors, constants = {}, {}, []
    for spec in program.graph_signature.input_specs:
        placeholder = spec.arg.name  # type: ignore[union-attr]
        if spec.kind == InputKind.USER_INPUT:
            names[placeholder] = inputs[placeholder]
            continue
        target = str(spec.target)
        owner: dict[str, Any] = program.constants | program.state_dict
        name = target.removeprefix("denoiser.") if spec.kind == InputKind.PARAMETER else f"constants.{placeholder}"
        tensors[name] = owner[target].detach().contiguous()
        names[placeholder] = f"weights[{name!r}]"
        if spec.kind != InputKind.PARAMETER:
            constants.append(name)
    lines, used = [], _used(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and node in used:
            arguments = [_text(argument, names) for argument in node.args]
            if node.target is torch.sym_float:  # a size as a float
                arguments.append("1")
            named = [f"{name}={_text(value, names)}" for name, value in node.kwargs.items() if name != "pin_memory"]
            lines.append(f"{node.name} = {_name_of(node.target)}({', '.join(arguments + named)})")
            names[node] = node.name
    results = program.graph.output_node().args[0]
    return NetworkGraph(lines, list(inputs.values()), [names[result] for result in results], tensors, constants)  # type: ignore


def _used(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs depend on; the rest are checks of the tracing."""
    used: set[fx.Node] = set()
    todo = [graph.output_node()]
    while todo:
        node = todo.pop()
        if node not in used:
            used.add(node)
            todo += node.all_input_nodes
    return used


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    if target is torch.sym_float:
        return "operator.truediv"
    if getattr(operator, getattr(target, "__name__", ""), None) is target:
        return f"operator.{target.__name__}"
    raise ValueError(f"the network has an operation that no exported graph has: {target}")


def _text(value: Any, names: dict[Any, str]) -> str:
    """An argument as it stands in a line."""
    if isinstance(value, fx.Node):
        return names[value] if value in names else names[value.name]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(item, names) for item in value)}]"
    if isinstance(value, torch.device):
        return "device"
    if value is None or isinstance(value, int | float | str | torch.dtype | torch.layout):
        return str(value) if isinstance(value, torch.dtype | torch.layout) else repr(value)
    raise ValueError(f"the network has an argument that no exported graph has: {value!r}")
