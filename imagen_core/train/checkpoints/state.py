"""What training changes: weights, their averages, the optimizer, and the number of steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_core.train.averages.ema import WeightAverages
from imagen_core.train.averages.power import POWER
from imagen_core.train.checkpoints.checkpoint import check_names, read_tensors, write_checkpoint
from imagen_core.train.checkpoints.rebuild import rounded
from imagen_core.train.data.noise_levels import NoiseLevelSampler
from imagen_core.train.errors import CheckpointMismatchError
from imagen_core.train.lora.adapter import saved_parameters
from imagen_core.train.parallel.muon import AnyOptimizer, moment_names
from imagen_core.train.parallel.offload import OffloadedAdamW
from imagen_core.train.parallel.precision import LossScale
from imagen_core.train.parallel.world import like, local, unsharded

PROJECTOR = "projector"
"""The file of a checkpoint with the projector of an alignment."""


class TrainState:
    """Saved and restored exactly, for any number of processes before and after."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer,
        averages: WeightAverages,
        noise_levels: NoiseLevelSampler,
        projector: Mapping[str, nn.Parameter] | None = None,
    ):
        """`projector`: parameters of an alignment by name, which the optimizer has too, but no average."""
        self.projector = projector or {}
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
        for average in self.averages.averages:
            files[average] = self._gather(self._average(average, parameters), writes)
        if self.projector:
            files[PROJECTOR] = self._gather(self.projector.items(), writes)
        files["optimizer"] = self._gather(self._moments(), writes)
        if self.noise_levels.learns:
            files["noise_levels"] = self.noise_levels.tensors()
        if not writes:
            return None
        progress = {
            **self._progress(),
            "loss_scale": None if self.loss_scale is None else asdict(self.loss_scale),
        }
        return write_checkpoint(folder, self.step, files, {**progress, **record}, check)

    def save_snapshot(
        self, folder: Path, record: dict[str, Any], *, writes: bool, check: Callable[[], None] = lambda: None
    ) -> None:
        """Writes the averages by profile as `rebuild` reads them; the arguments are those of `save`."""
        parameters, files = saved_parameters(self.model), {}
        for name in self.averages.by_profile:
            gathered = self._gather(self._average(name, parameters), writes)
            files[name] = {key: rounded(values) for key, values in gathered.items()}
        if writes:
            write_checkpoint(folder, self.step, files, {**self._progress(), **record}, check)

    def _progress(self) -> dict[str, Any]:
        averages = self.averages
        since = {"power_since": averages.since} if averages.by_profile else {}
        return {"samples": self.samples, "ema_updates": averages.updates, **since}

    def _average(self, average: str, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        values = self.averages.averages[average]
        return ((name, _laid_out(each, parameters[name])) for name, each in values.items())

    @torch.no_grad()
    def load(self, path: Path, saved: dict[str, Any]) -> None:
        """Restores everything from a checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged, or it has other averages by profile.
        """
        self._check_profiles(path, saved)
        parameters = saved_parameters(self.model)
        weights = read_tensors(path, saved, "model")
        check_names(path, parameters, weights)
        for name, values in weights.items():
            local(parameters[name]).copy_(local(like(values, parameters[name])))
        if keeps := f"{PROJECTOR}.safetensors" in saved["files"] and bool(self.projector):
            projector = read_tensors(path, saved, PROJECTOR)
            check_names(path, self.projector, projector)
            for name, values in projector.items():
                local(self.projector[name]).copy_(local(like(values, self.projector[name])))
        for name, average in self.averages.averages.items():
            known = f"{name}.safetensors" in saved["files"]
            source = read_tensors(path, saved, name if known else "model")  # a new one starts with the weights
            for key, values in source.items():
                average[key].copy_(local(like(values, parameters[key])).to(average[key].dtype))
        moments = read_tensors(path, saved, "optimizer")
        for name, parameter in self._trained():
            if name in self.projector and not keeps:
                continue  # a training that had no alignment begins with a new projector
            names = moment_names(self.optimizer, parameter)
            if missing := [moment for moment in names if f"{moment}.{name}" not in moments]:
                raise CheckpointMismatchError(
                    f"{path}: its optimizer has no {missing[0]} of {name}: it was trained with another "
                    "optimizer.kind, muon or adamw, or other groups; restore these, or start another --out with "
                    "init_from"
                )
            kept = {moment: moments[f"{moment}.{name}"] for moment in names}
            self.optimizer.state[parameter] = {}
            if "step" in kept:
                self.optimizer.state[parameter]["step"] = kept.pop("step").to(parameter.device)
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
        self.averages.updates = self.averages.since = saved["ema_updates"]
        if any(name.startswith(POWER) for name in saved["files"]):
            self.averages.since = saved.get("power_since", 0)

    def _check_profiles(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Refuses averages of which some would begin later than the others: their snapshots would not combine."""
        before = sorted(name.removesuffix(".safetensors") for name in saved["files"] if name.startswith(POWER))
        if before and (new := sorted({*self.averages.by_profile} - {*before})):
            raise CheckpointMismatchError(
                f"{path}: ema.profiles {', '.join(name.removeprefix(POWER) for name in new)} would begin at step "
                f"{saved['step']}, but {', '.join(name.removeprefix(POWER) for name in before)} began earlier; keep "
                "these, or any of them, from which the others are rebuilt"
            )

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters the optimizer has."""
        named = {**saved_parameters(self.model), **self.projector}
        return [(name, p) for name, p in named.items() if p.requires_grad]

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained():
            known = self.optimizer.state[parameter]
            names = moment_names(self.optimizer, parameter)
            if not known:  # no step was taken yet: all gradients overflowed
                known = dict.fromkeys(names, torch.zeros_like(parameter))
                known |= {"step": torch.zeros((), dtype=torch.float32)}
            for moment in names:
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
