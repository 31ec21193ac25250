"""What a training step needs in memory, worked out without allocating it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from imagen_core.diffusion import DenoiserConfig
from imagen_core.models import Conditioning


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one process in one training step; temporary buffers of single operations are not counted."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments, float32."""
    averages: int
    """The moving averages of the weights, float32."""
    activations: int
    """Tensors kept for the backward pass of one micro-batch."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate_memory(
    config: DenoiserConfig,
    *,
    micro_batch_size: int,
    side_px: int,
    num_tokens: int,
    bytes_per_activation: int,
    num_averages: int,
    num_shards: int,
) -> MemoryEstimate:
    """Estimate the memory of a training step in float32 weights.

    Args:
        side_px: side of the pictures or crops trained on.
        num_tokens: length of the captions in a batch.
        bytes_per_activation: 2 under bfloat16 autocast, 4 for float32, 8 for float64.
        num_shards: processes that share weights, gradients and optimizer states (1 without FSDP).
    """
    parameters, activations = _count(config, side_px, num_tokens)
    part = -(-parameters * 4 // num_shards)
    return MemoryEstimate(
        weights=part,
        gradients=part,
        optimizer=2 * part,
        averages=num_averages * part,
        activations=activations * bytes_per_activation * micro_batch_size,
    )


def _count(config: DenoiserConfig, side_px: int, num_tokens: int) -> tuple[int, int]:
    """Parameters, and values kept for the backward pass of one picture: from a run on tensors without data."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    unet_config = config.unet
    with FakeTensorMode(), _FlashAttention():
        unet: nn.Module = unet_config.build().train()
        weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        text = None if unet_config.text_dim is None else torch.randn(1, num_tokens, unet_config.text_dim)
        conditioning = Conditioning(
            text=text,
            text_mask=None if text is None else torch.ones(1, num_tokens, dtype=torch.bool),
            low_res=torch.randn(1, unet_config.in_channels, side_px, side_px) if unet_config.low_res else None,
            low_res_noise=torch.zeros(1) if unet_config.low_res_noise else None,
            labels=torch.zeros(1, dtype=torch.long) if getattr(unet_config, "num_classes", None) else None,
        )
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            alive = unet(torch.randn(1, unet_config.in_channels, side_px, side_px), torch.zeros(1), conditioning)
        total = sum(count for storage, count in kept.items() if storage not in weights)
        del alive
        return sum(p.numel() for p in unet.parameters()), total


class _FlashAttention(TorchFunctionMode):
    """Attention that keeps queries, keys, values and the result, as the fused kernels of GPUs do; never the
    matrix of weights, which the plain CPU kernel keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result
