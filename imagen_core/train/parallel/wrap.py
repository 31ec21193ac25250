"""Several processes: copies of the model that average their gradients, or one model sharded over them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from imagen_core.models.layers.noise_embedding import LearnedFourierEmbedding
from imagen_core.models.layers.positions import Rotary
from imagen_core.models.layers.transformer import TransformerLayer
from imagen_core.models.transformer.blocks import PatchBlock
from imagen_core.models.unet.block import Block
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import TrainError
from imagen_core.train.parallel.precision import autocast_dtype
from imagen_core.train.parallel.world import World

BLOCKS = (Block, PatchBlock, TransformerLayer)
"""The repeated blocks of networks: each is sharded on its own, and the linear layers in them are hidden ones."""
_NET = "denoiser.net"  # in the loss; all parameters are below it, but those of the projector of an alignment
_PROJECTOR = "alignment.projector"


def is_sharded(config: TrainConfig, world: World) -> bool:
    """Whether each process holds only a part of the model."""
    return world.size > 1 and config.parallel.kind == "fsdp2"


def parallelize(loss: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """Wraps the loss for the run's processes: DDP or FSDP2; for one process it is unchanged.

    Raises:
        TrainError: parallel.shard_group_size does not divide the processes.
    """
    if world.size == 1:
        return loss
    if config.parallel.kind == "ddp":
        devices = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=devices, gradient_as_bucket_view=True)
    group = config.parallel.shard_group_size or world.size
    if world.size % group:
        raise TrainError(f"parallel.shard_group_size {group} must divide the {world.size} processes")
    kind = world.device.type
    if group == world.size:
        mesh = init_device_mesh(kind, (world.size,))
    else:
        mesh = init_device_mesh(kind, (world.size // group, group), mesh_dim_names=("copies", "shards"))
    for net in _trained(loss, config):
        shard(net, mesh, autocast_dtype(config.precision))
    return loss


def _trained(loss: nn.Module, config: TrainConfig) -> list[nn.Module]:
    """The network, and the projector of an alignment."""
    return [loss.get_submodule(name) for name in (_NET, _PROJECTOR)[: 1 + (config.alignment is not None)]]


def shard(net: nn.Module, mesh: DeviceMesh, half: torch.dtype | None) -> None:
    """FSDP2 with one unit per block or layer; weights are gathered in `half`, if it is given."""
    exact = policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast decides the types
    if half is not None:
        policy = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in reversed(list(net.modules())):  # inner ones first
        if isinstance(module, LearnedFourierEmbedding | Rotary):  # frequencies must not be rounded
            fully_shard(module, mesh=mesh, mp_policy=exact)
        elif isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # What is outside of blocks is resharded too after each forward pass, so that code between the steps
    # (averages, checkpoints) always finds shards.
    fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def syncing(loss: nn.Module, config: TrainConfig, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged in the backward pass of the last micro-batch only."""
    if isinstance(loss, DistributedDataParallel):
        return nullcontext() if last else loss.no_sync()
    for net in _trained(loss, config):
        if isinstance(net, FSDPModule):
            net.set_requires_gradient_sync(last)
    return nullcontext()
