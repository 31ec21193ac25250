"""What a training step needs in memory, computed without allocating it."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from imagen_core.diffusion import Denoiser, DenoiserConfig, PriorConfig
from imagen_core.models import Conditioning
from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.train.components import OptimizerConfig
from imagen_core.train.lora.adapter import add_new_adapter, saved_parameters
from imagen_core.train.lora.config import LoraConfig
from imagen_core.train.optimizer import num_muon_parameters


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one process in one training step; temporary buffers of single operations are not counted."""

    weights: int
    """Float32, with those of an adapter."""
    gradients: int
    optimizer: int
    """Adam's two moments, or Muon's one, float32; 0 where they are in main memory."""
    averages: int
    """The moving averages of the weights that are trained, float32."""
    activations: int
    """Tensors kept for the backward pass of one micro-batch."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate_memory(
    config: DenoiserConfig | PriorConfig,
    *,
    micro_batch_size: int,
    shape: tuple[int, int] | None,
    num_tokens: int,
    bytes_per_activation: int,
    num_averages: int,
    num_shards: int,
    lora: LoraConfig | None = None,
    optimizer: OptimizerConfig | None = None,
) -> MemoryEstimate:
    """Estimates the memory of a training step with float32 weights.

    Args:
        shape: height and width of the images or crops trained on; None for a prior.
        num_tokens: length of the captions in a batch, by each encoder.
        bytes_per_activation: 2 under bfloat16 autocast, 4 for float32, 8 for float64.
        num_shards: processes that share weights, gradients and optimizer states (1 without FSDP).
        lora: the adapter that is trained; None: all weights are.
        optimizer: None: AdamW.
    Raises:
        TrainError: the adapter or a group of the optimizer does not fit the model, or peft is not installed.
    """
    optimizer = optimizer or OptimizerConfig()
    parameters, changed, muon, activations = _count(config, lora, optimizer, shape, num_tokens)
    trained = -(-changed * 4 // num_shards)
    return MemoryEstimate(
        weights=-(-parameters * 4 // num_shards),
        gradients=trained,
        optimizer=0 if optimizer.on_cpu else -(-(2 * changed - muon) * 4 // num_shards),
        averages=num_averages * trained,
        activations=activations * bytes_per_activation * micro_batch_size,
    )


def _count(
    config: DenoiserConfig | PriorConfig,
    lora: LoraConfig | None,
    optimizer: OptimizerConfig,
    shape: tuple[int, int] | None,
    num_tokens: int,
) -> tuple[int, int, int, int]:
    """Parameters, those that are trained, those of Muon, and values kept for the backward pass of one image: from a
    run on tensors without data."""
    kept: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with FakeTensorMode(), torch.device("meta"), _FlashAttention():
        denoiser = Denoiser(config).train()
        net = denoiser.net
        if lora is not None:
            add_new_adapter(denoiser, lora)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        of_one = config.shape if shape is None else (config.shape[0], *shape)
        x, conditioning = torch.randn(1, *of_one), any_conditioning(config, of_one, num_tokens)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            alive = net(x, torch.zeros(1), conditioning)
        total = sum(count for storage, count in kept.items() if storage not in weights)
        del alive
        trained = sum(p.numel() for p in saved_parameters(denoiser).values())
        muon = num_muon_parameters(denoiser, optimizer) if optimizer.kind == "muon" else 0
        return sum(p.numel() for p in net.parameters()), trained, muon, total


def any_conditioning(config: DenoiserConfig | PriorConfig, shape: tuple[int, ...], num_tokens: int) -> Conditioning:
    """One row of everything the network reads."""
    network, conditioning = config.network, Conditioning()
    if network.text_shapes:
        text = tuple(torch.randn(1, num_tokens, *shape) for shape in network.text_shapes)
        mask = tuple(torch.ones(1, num_tokens, dtype=torch.bool) for _ in text)
        several = isinstance(network.text_dim, tuple)
        conditioning = Conditioning(text=text if several else text[0], text_mask=mask if several else mask[0])
    if network.self_conditioning:
        conditioning = replace(conditioning, estimate=torch.randn(1, *shape))
    if isinstance(network, PriorNetworkConfig):
        return replace(conditioning, text_embed=torch.randn(1, network.dim))
    return replace(
        conditioning,
        characters=None
        if network.transcription is None
        else torch.ones(1, network.transcription.max_characters, dtype=torch.long),
        low_res=torch.randn(1, *shape) if network.low_res else None,
        low_res_noise=torch.zeros(1) if network.low_res_noise else None,
        labels=None if network.num_classes is None else torch.zeros(1, dtype=torch.long),
        text_embed=None if network.text_embed_dim is None else torch.randn(1, network.text_embed_dim),
        image_embed=None if network.image_embed_dim is None else torch.randn(1, network.image_embed_dim),
        images=torch.randn(1, network.condition_channels, *shape[1:]) if network.condition_channels else None,
    )


class _FlashAttention(TorchFunctionMode):
    """Attention that keeps queries, keys, values and the result, as the fused kernels of GPUs do; never the
    matrix of weights, which the plain CPU kernel keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FlashAttentionFunction.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FlashAttentionFunction(torch.autograd.Function):
    """An empty result, and the tensors that a fused kernel saves for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result
