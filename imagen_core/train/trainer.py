"""The training loop. `train` is the main path; everything it calls is in the files beside this one."""

import json
import math
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_core.diffusion import Denoiser, PriorConfig, diffusion_loss
from imagen_core.diffusion.self_conditioning import with_own_estimate
from imagen_core.images import write_png
from imagen_core.store import Store
from imagen_core.train.checkpoints.checkpoint import (
    LoadedDenoiser,
    best_checkpoints,
    checkpoints,
    load_checkpoint,
    read_state,
    record_validation,
    refuse_other,
    remove_old,
    remove_unfinished,
)
from imagen_core.train.checkpoints.init_from import LoadCheckpoint, initialize_from
from imagen_core.train.checkpoints.state import TrainState
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.encoders import encoders_of
from imagen_core.train.data.example import Example, make_example
from imagen_core.train.data.noise_levels import NoiseLevelSampler
from imagen_core.train.data.online import Encode, OnlineEncoder, with_text
from imagen_core.train.data.randomness import mix
from imagen_core.train.data.stream import Batch, BatchStream, open_store
from imagen_core.train.ema import WeightAverages
from imagen_core.train.errors import NonFiniteLossError, TrainError, TrainingStopped
from imagen_core.train.evaluation import sample_grid, similarities, validation_loss
from imagen_core.train.logs import Loggers, last_values
from imagen_core.train.meter import Meter
from imagen_core.train.optimizer import learning_rate, make_optimizer
from imagen_core.train.parallel.precision import LossScale, autocast_dtype, matmul_precision
from imagen_core.train.parallel.world import World, joined_world, local, whole
from imagen_core.train.parallel.wrap import is_sharded, parallelize, syncing
from imagen_core.train.profiling import StepProfiler


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where a training is. Rates are over the steps since the last report."""

    step: int
    num_steps: int
    loss: float
    images_per_s: float
    loader_wait: float
    """Part of the time spent waiting for batches, in [0, 1]."""


class TrainingLoss(nn.Module):
    """The loss of each image of an example, under the run's precision; what DDP and FSDP wrap."""

    def __init__(self, denoiser: Denoiser, config: TrainConfig, device_type: str):
        super().__init__()
        self.denoiser = denoiser
        self._autocast = autocast_dtype(config.precision)
        self._device_type = device_type

    def forward(self, example: Example) -> Tensor:
        """(b,)."""
        with torch.autocast(self._device_type, self._autocast, enabled=self._autocast is not None):
            conditioning = example.conditioning
            if example.shown_estimate is not None:
                conditioning = with_own_estimate(
                    self.denoiser, example.x0, example.sigma, example.noise, conditioning, example.shown_estimate
                )
            return diffusion_loss(self.denoiser, example.x0, example.sigma, example.noise, conditioning)


def _load_local(path: str, weights: str | None) -> LoadedDenoiser:
    return load_checkpoint(Path(path), weights)


def train(
    config: TrainConfig,
    out: Path,
    on_progress: Callable[[TrainingProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    online_encoder: OnlineEncoder | None = None,
    load: LoadCheckpoint = _load_local,
) -> dict[str, Any]:
    """Train to `num_steps`, going on from the newest checkpoint in `out/checkpoints`.

    The same call again goes on where a killed or stopped one was: weights, averages, optimizer and place in the data
    are restored, and random numbers are functions of the seed and the place. num_steps, batch and micro-batch size,
    precision, number of processes and everything of logging may differ from before; the model, and the encoder of the
    store, may not.

    Args:
        on_progress: called on the first process every `log_every_steps`.
        should_stop: asked at every step on every process; if one says yes, all save a checkpoint and stop.
        online_encoder: encodes the captions of each batch, instead of reading `text` from the store; slower, to
            compare with.
        load: reads `init_from`; without it only local paths are known.
    Returns:
        steps, samples, loss, validation_loss, images_per_s, loader_wait, peak_memory_bytes, checkpoint (None in a
        process that has no file of it), best_checkpoint (of the least validation loss; None without validation).
    Raises:
        TrainError: settings, store or checkpoint do not fit; see its children.
        NonFiniteLossError: the batch's keys are in `out/nan/`.
        TrainingStopped: should_stop said yes; a checkpoint was saved.
        StoreError: the store cannot be read.
    """
    with matmul_precision(tf32=config.tf32), joined_world() as world:
        # Model: the same random weights on every process.
        store = open_store(config, online=online_encoder is not None)
        if online_encoder is not None:
            _check_online(online_encoder, config)
        torch.manual_seed(mix(config.seed, 5))
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        denoiser = Denoiser(config.denoiser).to(world.device, dtype)
        if config.channels_last and not is_sharded(config, world):  # FSDP takes contiguous parameters only
            denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            # Lengths and batch sizes are few (`make_example`); each gets a network of its own, as does evaluation.
            torch._dynamo.config.recompile_limit = 32
            denoiser.net.compile(dynamic=False)
        loss = parallelize(TrainingLoss(denoiser, config, world.device.type), config, world)
        encode = None if online_encoder is None else online_encoder.load()

        # What training changes, and where it was.
        found = _newest_checkpoint(out, world)
        if found is None and config.init_from is not None:
            start = initialize_from(denoiser, config, load)
            if world.is_main:
                _write_json(out / "start.json", asdict(start))
        state = TrainState(
            denoiser,
            make_optimizer(denoiser, config.optimizer),
            WeightAverages(denoiser, config.ema.rates, "cpu" if config.ema.on_cpu else None),
            NoiseLevelSampler(config),
        )
        state.loss_scale = LossScale() if config.precision == "float16" else None
        saved = None if found is None else read_state(found)
        encoders = encoders_of(store, config, online_encoder)
        if found is not None and saved is not None:
            refuse_other(saved, found, denoiser=_json(config.denoiser), **encoders)
            state.load(found, saved)

        loggers = Loggers(config, out, state.step, writes=world.is_main)
        run = _Run(config, out, world, store, encoders, encode, denoiser, loss, state, loggers)
        try:
            return run.train(saved["loader"] if saved else None, on_progress, should_stop)
        finally:
            run.loggers.close()


class _Run:
    """One call of `train`: the loop and what it does on schedule."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        world: World,
        store: Store,
        encoders: dict[str, Any],
        encode: Encode | None,
        denoiser: Denoiser,
        loss: nn.Module,
        state: TrainState,
        loggers: Loggers,
    ):
        self.config, self.out, self.world, self.store = config, out, world, store
        self.encoders, self.encode = encoders, encode
        self.denoiser, self.loss, self.state, self.loggers = denoiser, loss, state, loggers
        self.last: dict[str, Any] = {}

    def train(
        self,
        loader_state: dict[str, Any] | None,
        on_progress: Callable[[TrainingProgress], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> dict[str, Any]:
        config, state = self.config, self.state
        meter, profiler = Meter(), StepProfiler(config.profile_steps, self.out, self.world.rank)
        stream = BatchStream(self.store, config, self.world, loader_state, online=self.encode is not None)
        text_dim = config.denoiser.network.text_dim or 0
        checkpoint = None
        try:
            while state.step < config.num_steps:
                profiler.before(state.step + 1)
                batch = stream.next()
                batch = replace(batch, raw=with_text(batch.raw, self.encode, text_dim, config.max_tokens))
                stop = should_stop is not None and should_stop()
                mean_loss, norm, stopping = self._step(batch, stop)
                loader_state = batch.loader_state
                meter.add(mean_loss, norm, batch.global_size)
                step, last = state.step, state.step == config.num_steps
                profiler.after(step, last=last or stopping)

                if step % config.log_every_steps == 0 or last:
                    self._log(meter, stream.waited_s, on_progress)
                    meter = Meter(stream.waited_s)
                with meter.paused():
                    if step % config.checkpoint_every_steps == 0 or last or stopping:
                        checkpoint = self._save(loader_state)  # before what takes long: a kill may follow a stop
                    if stopping and not last:
                        raise TrainingStopped(f"stopped after step {step}; run the same command again to go on")
                    if config.num_validation_samples and (step % config.validate_every_steps == 0 or last):
                        self._validate()
                    if config.grid_every_steps and (step % config.grid_every_steps == 0 or last):
                        self._write_grid()
        finally:
            stream.close()
        return self._summary(checkpoint)

    def _step(self, batch: Batch, stop: bool) -> tuple[float, float, bool]:
        """One optimizer step: mean loss of the global batch, gradient norm, and whether any process wants to stop."""
        config, state, world = self.config, self.state, self.world
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, state.step, config.num_steps) * group["lr_scale"]
        torch.manual_seed(mix(config.seed, 6, state.step, world.rank))  # dropout

        scale = 1.0 if state.loss_scale is None else state.loss_scale.value
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        most = batch.largest_part  # all processes take as many micro-batches
        size = config.micro_batch_size or most
        starts = range(0, most, size)
        drawn = total.new_zeros(2, world.size * most if state.times.learns else 0)  # loss and step + 1, by sample
        for start in starts:
            part = batch.part(start, start + size)
            example = make_example(part, config, self.denoiser, world.device, state.step, state.times)
            with syncing(self.loss, start == starts[-1]):
                losses = self.loss(example)
                if state.times.learns:
                    count, first = len(part.keys), world.rank * most + start
                    drawn[0, first : first + count] = losses.detach()[:count]
                    drawn[1, first : first + count] = state.times.steps(example.sigma)[:count] + 1
                losses = losses * example.weight
                if not part.keys:  # this process has no sample of the batch, but takes part in the collectives
                    losses = losses * 0
                # Processes average their gradients: the mean over the global batch needs its size, not ours.
                (losses.sum() * (world.size / batch.global_size * scale)).backward()
            total += losses.detach().sum().double()

        if scale != 1:
            gradients = [local(p.grad) for p in self.denoiser.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / scale)  # pyright: ignore[reportPrivateImportUsage]
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), config.optimizer.clip_norm, foreach=True)
        norm = whole(norm)
        broken = (~torch.isfinite(total + norm)).double()
        sums = torch.stack([total, norm.double() / world.size, broken, total.new_tensor(float(stop))])
        sums = world.sum(torch.cat([sums, drawn.flatten()])).tolist()  # the one time a step waits for the GPU
        loss, norm, broken, stopping = sums[:4]
        mean_loss = loss / batch.global_size
        overflow = state.loss_scale is not None and math.isfinite(mean_loss) and scale > 1
        if broken and not overflow:
            self._report_non_finite(batch, mean_loss, norm)
        if not broken:
            state.optimizer.step()
        if state.loss_scale is not None and broken:
            state.loss_scale.shrink()
        elif state.loss_scale is not None:
            state.loss_scale.grow()
        state.optimizer.zero_grad(set_to_none=True)
        losses_drawn, steps_drawn = sums[4 : 4 + drawn.shape[1]], sums[4 + drawn.shape[1] :]
        known = [(int(step) - 1, loss) for step, loss in zip(steps_drawn, losses_drawn, strict=True) if step]
        state.times.record(known)
        state.step += 1
        state.samples += batch.global_size
        counts = state.step % config.ema.every_steps == 0
        if not broken and (counts or state.averages.updates == 0):
            state.averages.update(counts=counts)
        return mean_loss, norm, stopping > 0

    def _log(self, meter: Meter, waited_s: float, on_progress: Callable[[TrainingProgress], None] | None) -> None:
        values = meter.values(waited_s)
        first = self.state.optimizer.param_groups[0]
        lr = first["lr"] / first["lr_scale"]
        self.loggers.scalars(
            self.state.step,
            {
                "samples": self.state.samples,
                **values,
                "lr": lr,
                **({} if self.state.loss_scale is None else {"loss_scale": self.state.loss_scale.value}),
                "peak_memory_bytes": _peak_memory(self.world),
            },
        )
        self.last |= values
        if on_progress is not None and self.world.is_main:
            progress = TrainingProgress(
                self.state.step, self.config.num_steps, values["loss"], values["images_per_s"], values["loader_wait"]
            )
            on_progress(progress)

    @contextmanager
    def _evaluating(self, *, averaged: bool) -> Iterator[None]:
        """Within this block the model is in eval mode, with its slowest average of weights if `averaged`."""
        rates = self.config.ema.rates
        self.denoiser.eval()
        try:
            with self.state.averages.applied(max(rates)) if averaged and rates else nullcontext():
                yield
        finally:
            self.denoiser.train()

    def _validate(self) -> None:
        arguments = (self.loss, self.denoiser, self.store, self.config, self.world, self.encode)
        with self._evaluating(averaged=False):
            plain = validation_loss(*arguments)
        with self._evaluating(averaged=True):
            averaged = validation_loss(*arguments)
        if self.world.is_main:
            record_validation(self.out / "checkpoints", self.state.step, averaged)
        self.last["validation_loss"] = averaged
        values = {"validation_loss": averaged, "validation_loss_without_ema": plain}
        if isinstance(self.config.denoiser, PriorConfig):
            with self._evaluating(averaged=True):
                values |= similarities(*arguments[1:])
        self.last |= values
        self.loggers.scalars(self.state.step, values)

    def _write_grid(self) -> None:
        with self._evaluating(averaged=True):
            pixels = sample_grid(self.denoiser, self.store, self.config, self.world, self.encode)
        if self.world.is_main:
            (self.out / "grids").mkdir(exist_ok=True)
            write_png(self.out / "grids" / f"step-{self.state.step:08d}.png", pixels)
            self.loggers.image(self.state.step, "grid", pixels)

    def _save(self, loader_state: dict[str, Any] | None) -> Path | None:
        folder = self.out / "checkpoints"
        path = self.state.save(
            folder,
            {
                "loader": loader_state,
                "denoiser": _json(self.config.denoiser),
                **self.encoders,
                "config": _json(self.config),
                "torch": torch.__version__,
            },
            writes=self.world.is_main,
        )
        if self.world.is_main:
            remove_old(folder, self.config.keep_checkpoints, self.config.keep_best_checkpoints)
        self.world.wait()
        return path

    def _report_non_finite(self, batch: Batch, loss: float, norm: float) -> None:
        path = self.out / "nan" / f"step-{self.state.step:08d}.json"
        keys = [key for part in self.world.gather(batch.keys) for key in part]
        if self.world.is_main:
            _write_json(path, {"step": self.state.step, "loss": str(loss), "grad_norm": str(norm), "keys": keys})
        raise NonFiniteLossError(
            f"step {self.state.step}: loss {loss}, gradient norm {norm}, not finite; the batch's keys are in {path}. "
            "Go on from the last checkpoint, or begin anew, with a lower optimizer.lr or without these samples"
        )

    def _summary(self, checkpoint: Path | None) -> dict[str, Any]:
        last = self.last or last_values(self.out / "metrics.jsonl")  # nothing was left to do
        if checkpoint is None:  # saved before, or by the main process, whose folder need not be this one
            checkpoint = next(reversed(checkpoints(self.out / "checkpoints")), None)
        return {
            "steps": self.state.step,
            "samples": self.state.samples,
            "loss": last.get("loss"),
            "validation_loss": last.get("validation_loss"),
            "images_per_s": last.get("images_per_s"),
            "loader_wait": last.get("loader_wait"),
            "peak_memory_bytes": _peak_memory(self.world),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "best_checkpoint": next(map(str, best_checkpoints(self.out / "checkpoints")), None),
        }


def _newest_checkpoint(out: Path, world: World) -> Path | None:
    """What to go on from; leftovers of a kill are removed."""
    if world.is_main:
        remove_unfinished(out / "checkpoints")
    found = checkpoints(out / "checkpoints")
    newest = found[-1] if found else None
    seen = [str(path and path.name) for path in world.gather(newest)]
    if len(set(seen)) > 1:
        raise TrainError(
            f"{out}: the processes see different checkpoints ({', '.join(sorted(set(seen)))}); use a folder that all "
            "machines share"
        )
    return newest


def _check_online(encoder: OnlineEncoder, config: TrainConfig) -> None:
    """Refuses an encoder whose captions the model does not read."""
    if encoder.facts["name"] != config.text:
        raise TrainError(
            f"text is {config.text!r}, but the online encoder is named {encoder.facts['name']!r}; give both one name"
        )
    if encoder.facts["dim"] != config.denoiser.network.text_dim:
        raise TrainError(
            f"text_dim is {config.denoiser.network.text_dim}, but the embeddings of the online encoder are "
            f"{encoder.facts['dim']} wide; set text_dim={encoder.facts['dim']}"
        )


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _json(config: Any) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _peak_memory(world: World) -> int:
    """Bytes: of the GPU, or of this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
