"""What training changes: weights, their averages, the optimizer, and the number of steps."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_core.train.checkpoints.checkpoint import check_names, read_tensors, write_checkpoint
from imagen_core.train.data.noise_levels import NoiseLevelSampler
from imagen_core.train.ema import WeightAverages
from imagen_core.train.lora.adapter import saved_parameters
from imagen_core.train.offload import OffloadedAdamW
from imagen_core.train.parallel.precision import LossScale
from imagen_core.train.parallel.world import like, local, unsharded

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class TrainState:
    """Saved and restored exactly, for any number of processes before and after."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: WeightAverages,
        noise_levels: NoiseLevelSampler,
    ):
        self.model, self.optimizer, self.averages, self.noise_levels = model, optimizer, averages, noise_levels
        self.step = 0
        self.samples = 0
        self.whole = True
        """Whether everything is of the same step; false within an update."""
        self.loss_scale: LossScale | None = None
        """Only with float16."""

    def save(
        self, folder: Path, record: dict[str, Any], *, writes: bool, check: Callable[[], None] = lambda: None
    ) -> Path | None:
        """Writes a checkpoint on the process that writes; all processes must call it (shards are gathered).

        Args:
            check: see `write_checkpoint`.
        """
        parameters = saved_parameters(self.model)
        files: dict[str, dict[str, Tensor]] = {"model": self._gather(parameters.items(), writes)}
        for rate, average in self.averages.averages.items():
            laid_out = ((name, _laid_out(values, parameters[name])) for name, values in average.items())
            files[f"ema-{rate}"] = self._gather(laid_out, writes)
        files["optimizer"] = self._gather(self._moments(), writes)
        if self.noise_levels.learns:
            files["noise_levels"] = self.noise_levels.tensors()
        if not writes:
            return None
        progress = {
            "samples": self.samples,
            "ema_updates": self.averages.updates,
            "loss_scale": None if self.loss_scale is None else asdict(self.loss_scale),
        }
        return write_checkpoint(folder, self.step, files, {**progress, **record}, check)

    @torch.no_grad()
    def load(self, path: Path, saved: dict[str, Any]) -> None:
        """Restores everything from a checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        parameters = saved_parameters(self.model)
        weights = read_tensors(path, saved, "model")
        check_names(path, parameters, weights)
        for name, values in weights.items():
            local(parameters[name]).copy_(local(like(values, parameters[name])))
        for rate, average in self.averages.averages.items():
            name = f"ema-{rate}"
            known = f"{name}.safetensors" in saved["files"]
            source = read_tensors(path, saved, name if known else "model")  # a new rate starts with the weights
            for key, values in source.items():
                average[key].copy_(local(like(values, parameters[key])).to(average[key].dtype))
        moments = read_tensors(path, saved, "optimizer")
        for name, parameter in self._trained():
            kept = {moment: moments[f"{moment}.{name}"] for moment in _MOMENTS}
            self.optimizer.state[parameter] = {"step": kept.pop("step").to(parameter.device)}
            for moment, values in kept.items():  # in the parameter's memory order: the fused kernel does not check it
                restored = torch.empty_like(parameter)
                local(restored).copy_(local(like(values, parameter)))
                self.optimizer.state[parameter][moment] = restored
            if isinstance(self.optimizer, OffloadedAdamW):
                self.optimizer.offload(parameter)
        if self.noise_levels.learns and "noise_levels.safetensors" in saved["files"]:  # else it starts to learn them
            self.noise_levels.load(read_tensors(path, saved, "noise_levels"))
        if self.loss_scale is not None and saved.get("loss_scale") is not None:
            self.loss_scale = LossScale(**saved["loss_scale"])
        self.step, self.samples = saved["step"], saved["samples"]
        self.averages.updates = saved["ema_updates"]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters the optimizer has."""
        return [(name, p) for name, p in saved_parameters(self.model).items() if p.requires_grad]

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained():
            known = self.optimizer.state[parameter]
            if not known:  # no step was taken yet: all gradients overflowed
                zeros = torch.zeros_like(parameter)
                known = {"exp_avg": zeros, "exp_avg_sq": zeros, "step": torch.zeros((), dtype=torch.float32)}
            for moment in _MOMENTS:
                yield f"{moment}.{name}", _laid_out(known[moment], parameter)

    @staticmethod
    def _gather(tensors: Iterable[tuple[str, Tensor]], writes: bool) -> dict[str, Tensor]:
        gathered: dict[str, Tensor] = {}
        for name, tensor in tensors:
            values = unsharded(tensor).detach()
            if writes:
                gathered[name] = values.to("cpu", copy=True)
        return gathered


def _laid_out(values: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of a tensor as large as the parameter as a sharded tensor, if the parameter is one."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor) or isinstance(values, DTensor) or not values.ndim:
        return values
    return DTensor.from_local(
        values.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
