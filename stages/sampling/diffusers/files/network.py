"""A network as a list of torch operations, which is its config.json, and its tensors.

Copied by `pipeline export --to diffusers` (https://pypi.org/project/imagen-precompute) next to the weights of each
stage. A line of the graph assigns the result of one operation of `torch.ops` or `operator` to a name:

    conv2d_1 = aten.conv2d.default(silu_2, weights['net.conv_in.weight'], None, [1, 1], [1, 1])

The lines are read as expressions of names, numbers, lists and such calls; nothing else is evaluated.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

_CONSTANTS = {"inf": float("inf"), "nan": float("nan")}
_SIZES = ("getitem", "add", "sub", "mul", "neg", "mod", "floordiv", "truediv", "pow")
_SIZES += ("eq", "ne", "lt", "le", "gt", "ge")
"""What is computed with the sizes of tensors; operations on tensors are those of torch.ops.aten."""
_PRODUCTS = ("linear", "conv2d", "conv_transpose2d", "einsum", "matmul", "scaled_dot_product_attention")
"""What runs in the type of the weights; all else runs in float32."""
_LOW = (torch.float16, torch.bfloat16)

Values = dict[str, Any]
Reader = Callable[[Values], Any]


class Network(ModelMixin, ConfigMixin):
    """The denoiser of one stage: estimates the clean image from a noisy one."""

    @register_to_config
    def __init__(
        self,
        graph: list[str],
        inputs: list[str],
        outputs: list[str],
        tensors: dict[str, list[int]],
        buffers: dict[str, str],
        sampling: dict[str, Any],
    ):
        """
        Args:
            graph: the operations, in their order.
            inputs: names of the inputs.
            outputs: names of the results: the estimate, and of a learned variance its channels.
            tensors: shape of each tensor of diffusion_pytorch_model.safetensors.
            buffers: type of those tensors that are no parameters.
            sampling: how the pipeline samples with it.
        """
        super().__init__()
        for name, shape in tensors.items():
            *parents, last = name.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner._modules[parent]  # type: ignore[assignment]
            if name in buffers:
                owner.register_buffer(last, torch.empty(shape, dtype=getattr(torch, buffers[name])))
            else:
                owner.register_parameter(last, nn.Parameter(torch.empty(shape)))
        self._program = _program(graph, outputs)

    def forward(self, x: Tensor, sigma: Tensor, **conditions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Estimates x0 from x = x0 + sigma * noise.

        With weights of half precision only convolutions and other products run so.

        Args:
            x: float32 (b, c, h, w), with x0 in [-1, 1].
            sigma: float32 (b,), noise levels > 0.
            conditions: the other inputs: text (b, l, dim) with text_mask, bool (b, l), and text_keep, bool (b,), false
                for the unconditional estimate; labels (b,) with labels_keep; low_res (b, c, h, w) with
                low_res_noise (b,).
        Returns:
            The estimate, and the channels of a learned variance or None; both float32 (b, c, h, w).
        """
        values: Values = {name: {"x": x, "sigma": sigma, **conditions}[name] for name in self.config["inputs"]}
        values |= {"weights": {**dict(self.named_parameters()), **dict(self.named_buffers())}, "device": x.device}
        values["low"] = self.dtype if self.dtype in _LOW else None
        for name, read, done in self._program:
            values[name] = read(values)
            for used in done:
                values.pop(used, None)
        results = [values[name] for name in self.config["outputs"]]
        return results[0], results[1] if len(results) > 1 else None


def _program(graph: list[str], outputs: list[str]) -> list[tuple[str, Reader, list[str]]]:
    """For each line the name it sets, the function that gives its value, and the names not read again."""
    program: list[tuple[str, Reader, list[str]]] = []
    read_later = {"weights", "device", "low", "aten", "operator", "torch", *outputs}
    for text in reversed(graph):
        line = ast.parse(text).body[0]
        if not isinstance(line, ast.Assign) or not isinstance(line.targets[0], ast.Name):
            raise ValueError(f"graph: {text} is no operation of a network")
        read = {node.id for node in ast.walk(line.value) if isinstance(node, ast.Name)}
        program.append((line.targets[0].id, _reader(line.value), sorted(read - read_later)))
        read_later |= read
    return program[::-1]


def _reader(node: ast.expr) -> Reader:
    """A function of the values that have been computed; ValueError for what no graph has."""
    if isinstance(node, ast.Constant):
        return lambda values: node.value
    if isinstance(node, ast.Name):
        name = node.id
        return (lambda values: _CONSTANTS[name]) if name in _CONSTANTS else (lambda values: values[name])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _reader(node.operand)
        return lambda values: -operand(values)
    if isinstance(node, ast.List):
        items = [_reader(item) for item in node.elts]
        return lambda values: [item(values) for item in items]
    if isinstance(node, ast.Subscript):
        weight = ast.literal_eval(node.slice)
        return lambda values: values["weights"][weight]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        constant = getattr(torch, node.attr)  # a type or a layout
        return lambda values: constant
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        function, is_product = _function(name), name.split(".")[1] in _PRODUCTS
        arguments = [_reader(argument) for argument in node.args]
        named = {str(keyword.arg): _reader(keyword.value) for keyword in node.keywords}

        def call(values: Values) -> Any:
            given, low = [read(values) for read in arguments], values["low"]
            options = {key: read(values) for key, read in named.items()}
            if low is None:
                return function(*given, **options)
            dtype = low if is_product else torch.float32
            return _cast(function(*_cast(given, dtype), **options), torch.float32)

        return call
    raise ValueError(f"graph: {ast.unparse(node)} is no operation of a network")


def _function(name: str) -> Callable[..., Any]:
    library, _, rest = name.partition(".")
    if library == "operator" and rest in _SIZES:
        return getattr(operator, rest)
    if library != "aten":
        raise ValueError(f"graph: {name} is no operation of a network")
    packet, overload = rest.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of up to 32 bits in another floating-point type."""
    if isinstance(value, list | tuple):
        return [_cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in (*_LOW, torch.float32) else value
