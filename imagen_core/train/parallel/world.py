"""The processes of a training run: this one alone, or the ones that torchrun or Ray Train started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, elementwise; the same result on each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank; for small values, seldom."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns when all processes have called it."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_world() -> Iterator[World]:
    """Joins the process group (gloo on CPU, nccl on GPU), or runs alone; leaves a group it created at the end."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        sees_all = local_rank < torch.cuda.device_count()  # Ray may show each process only its own GPU
        device = torch.device("cuda", local_rank if sees_all else 0)
        torch.cuda.set_device(device)
    made = False
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        made = True
    try:
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield World(0, 1, device)
    finally:
        if made:
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process (a collective); other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, example: Tensor) -> Tensor:
    """An unsharded tensor laid out as `example`: on its device, in its dtype, and sharded if it is."""
    values = values.to(device=example.device, dtype=example.dtype)
    if not isinstance(example, DTensor):
        return values
    return distribute_tensor(values, example.device_mesh, example.placements, src_data_rank=None)
