"""The training loop. `train` is the main path; everything it calls is in the other files of this package."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from imagen_core.diffusion import Denoiser, PriorConfig
from imagen_core.images import write_png
from imagen_core.models.layers.cpu import use_onednn
from imagen_core.sealed import write_sealed
from imagen_core.store import Store
from imagen_core.text_batch import EncoderRecords
from imagen_core.train.alignment.projection import make_alignment
from imagen_core.train.averages.ema import WeightAverages
from imagen_core.train.checkpoints.checkpoint import checkpoints, read_state, refuse_other
from imagen_core.train.checkpoints.init_from import Start, initialize_from
from imagen_core.train.checkpoints.kept import (
    best_checkpoints,
    newest_checkpoint,
    record_validation,
    remove_later,
    remove_old,
    validation_losses,
)
from imagen_core.train.checkpoints.load import LoadCheckpoint, load_local
from imagen_core.train.checkpoints.rebuild import SNAPSHOTS
from imagen_core.train.checkpoints.state import TrainState
from imagen_core.train.config import TrainConfig
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.encoders import encoder_records, null_text
from imagen_core.train.data.noise_levels import NoiseLevelSampler
from imagen_core.train.data.online import OnlineEncoder
from imagen_core.train.data.randomness import RandomStream, mix
from imagen_core.train.data.store import UnreadableError, agree, opened_again, store_lost, trained_shapes
from imagen_core.train.data.stores import open_stores, resumed_state
from imagen_core.train.data.stream import BatchStream
from imagen_core.train.errors import StoreLostError, TrainError, TrainingStopped
from imagen_core.train.evaluation import sample_grid, similarities, validation_metrics
from imagen_core.train.logs import METRICS, Loggers, last_values
from imagen_core.train.lora.adapter import add_new_adapter
from imagen_core.train.loss import TrainingLoss
from imagen_core.train.meter import Meter, OnProgress, TrainingProgress, peak_memory
from imagen_core.train.optimizer import decay_start, make_optimizer
from imagen_core.train.parallel.precision import LossScale, kernel_settings, weights_dtype
from imagen_core.train.parallel.world import World, joined_world
from imagen_core.train.parallel.wrap import is_sharded, parallelize
from imagen_core.train.profiling import StepProfiler
from imagen_core.train.start import TrainingStart, record_start, refuse_lost, training_start
from imagen_core.train.step import step_limit, take_step

log = logging.getLogger(__name__)
T = TypeVar("T")


def train(
    config: TrainConfig,
    out: Path,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    online_encoder: OnlineEncoder | None = None,
    load: LoadCheckpoint = load_local,
    on_start: Callable[[TrainingStart], None] | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains to `num_steps`, resuming from the newest checkpoint in `out/checkpoints`.

    The same call again resumes where a killed or stopped one was: weights, averages, optimizer and place in the data
    are restored, and random numbers are functions of the seed and the place. num_steps, batch and micro-batch size,
    precision, number of processes and everything of logging may differ from the previous call; the model, and the
    encoder of the store, may not.

    Args:
        on_progress: called on the first process every `logging.every_steps`.
        should_stop: called at every step on every process; if one returns true, all save a checkpoint and stop.
        online_encoder: encodes the captions of each batch, instead of reading `text` from the store; slower, for
            comparison.
        load: reads `init_from.path`; the default reads local paths only.
        on_start: called on the first process before the first step, also if none is left to do.
        check: called on every process at the end of each step and before each file that is written; what it raises
            ends the training, and nothing more is written.
    Returns:
        steps, samples, loss, validation_loss, images_per_s, loader_wait, peak_memory_bytes, epoch (of a mixture
        epoch/NAME for each store), checkpoint (None in a process without its files), best_checkpoint (of the least
        validation loss; None without validation).
    Raises:
        TrainError: settings, store or checkpoint do not fit; see its children.
        NonFiniteLossError: the batch's keys are in `out/nan/`.
        TrainingStopped: should_stop returned true; a checkpoint was saved.
        StoreLostError: the store cannot be read any more; a checkpoint was saved.
        StoreError: it cannot be read from the beginning.
    """
    settings = kernel_settings(tf32=config.compute.tf32, cudnn_autotune=config.compute.cudnn_autotune)
    with settings, joined_world() as world:
        # Model: the same weights on every process.
        stores = open_stores(config, online=online_encoder is not None)
        if online_encoder is not None:
            online_encoder.check(config)
        found = newest_checkpoint(out / "checkpoints", world)
        if found is None:
            refuse_lost(out, config)
        trained_on = encoder_records(stores, config, online_encoder)["encoder"] if found is None else None
        denoiser, base = _make_denoiser(config, world, stores, load, trained_on)
        alignment = make_alignment(denoiser, config, stores, world.device)
        loss = parallelize(TrainingLoss(denoiser, config, world.device.type, alignment), config, world)
        projector = {} if alignment is None else {f"alignment.{name}": p for name, p in alignment.named_parameters()}
        encode = None if online_encoder is None else online_encoder.load()
        context = TrainingContext(config, stores, world, denoiser, loss, encode, null_text(stores, config, encode))

        # What training changes, as the newest checkpoint has it.
        if found is None and config.init_from is not None:
            loaded = base or initialize_from(denoiser, config, load, trained_on)
            if world.is_main:
                write_sealed(out / "start.json", asdict(loaded))
        state = TrainState(
            denoiser,
            make_optimizer(denoiser, config.optimizer, projector),
            WeightAverages(
                denoiser, config.ema.rates, "cpu" if config.ema.on_cpu else None, profiles=config.ema.profiles
            ),
            NoiseLevelSampler(config),
            projector,
        )
        state.loss_scale = LossScale() if config.precision == "float16" else None
        saved = None if found is None else read_state(found)
        records = {**encoder_records(stores, config, online_encoder), **_adapter_record(config, base)}
        if found is not None and saved is not None:
            refuse_other(saved, found, denoiser=_json(config.denoiser), **records)
            saved["loader"] = resumed_state(saved["loader"], saved["config"], config)
            state.load(found, saved)
        if world.is_main:
            remove_later(out / SNAPSHOTS, state.step)
            start = training_start(context, state.step, saved and saved.get("config"))
            if state.step < config.num_steps:
                record_start(out, start)
            if on_start is not None:
                on_start(start)

        loggers = Loggers(config, out, state.step, writes=world.is_main)
        try:
            run = TrainingRun(context, out, state, loggers, records, check)
            return run.run(saved["loader"] if saved else None, on_progress, should_stop)
        finally:
            loggers.close()


def _make_denoiser(
    config: TrainConfig, world: World, stores: Mapping[str, Store], load: LoadCheckpoint, encoder: EncoderRecords
) -> tuple[Denoiser, Start | None]:
    """The model of this process, and the base that was loaded into it, if an adapter is trained."""
    torch.manual_seed(mix(config.seed, RandomStream.WEIGHTS))
    denoiser, base = Denoiser(config.denoiser), None
    if config.lora is not None:
        base = initialize_from(denoiser, config, load, encoder)
        add_new_adapter(denoiser, config.lora)
    denoiser.to(world.device, weights_dtype(config.precision))
    if config.compute.channels_last and not is_sharded(config, world):  # FSDP takes contiguous parameters only
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if world.device.type == "cpu" and not config.compute.compile and not is_sharded(config, world):
        use_onednn(denoiser)
    if config.compute.compile:
        # Lengths, batch sizes and shapes are few (`make_example`); each gets its own compiled network, as does
        # evaluation.
        shapes = max(len(trained_shapes(store, config)) for store in stores.values())
        torch._dynamo.config.recompile_limit = limit = 32 * max(1, shapes)
        torch._dynamo.config.accumulated_recompile_limit = max(256, 2 * limit)
        denoiser.net.compile(dynamic=False)
    return denoiser, base


class TrainingRun:
    """One call of `train`: the loop, and logging, validation, grids and checkpoints on schedule."""

    def __init__(
        self,
        context: TrainingContext,
        out: Path,
        state: TrainState,
        loggers: Loggers,
        records: dict[str, Any],
        check: Callable[[], None] | None = None,
    ):
        """`records`: what checkpoints keep besides: the `encoder_records`, and the adapter."""
        self._check = check or (lambda: None)
        self._saved_step = state.step
        self._decay_start = decay_start(context.config.optimizer, context.config.num_steps)
        self.context, self.out, self.state, self.loggers, self.records = context, out, state, loggers, records
        self.config, self.world = context.config, context.world
        self.last: dict[str, Any] = {}
        """The newest value of each metric."""

    def run(
        self,
        loader_state: dict[str, Any] | None,
        on_progress: OnProgress | None,
        should_stop: Callable[[], bool] | None,
    ) -> dict[str, Any]:
        """Trains to the last step; returns the summary of `train`."""
        config, state, context = self.config, self.state, self.context
        meter, profiler = Meter(), StepProfiler(config.logging.profile_steps, self.out, self.world.rank)
        stream = BatchStream(context.stores, config, self.world, loader_state, context.encode)
        checkpoint, first = None, state.step
        try:
            self._evaluate_what_is_due()
            while state.step < config.num_steps:
                profiler.before(state.step + 1)
                with step_limit(config.compute.step_limit_s if state.step > first else None, state.step + 1):
                    batch = stream.next()
                    stop = should_stop is not None and should_stop()
                    result = take_step(context, state, batch, self.out, stop=stop)
                if result.lost:
                    raise UnreadableError(batch.error)
                loader_state = batch.loader_state
                meter.add(result.loss, result.grad_norm, batch.global_size, result.alignment)
                self._check()
                step, last, stopping = state.step, state.step == config.num_steps, result.stopping
                profiler.after(step, last=last or stopping)

                if step % config.logging.every_steps == 0 or last:
                    self._log(meter, stream.waited_s, batch.epochs, on_progress)
                    meter = Meter(stream.waited_s)
                with meter.paused():
                    if config.ema.snapshot_every_steps and (step % config.ema.snapshot_every_steps == 0 or last):
                        self._save_snapshot()
                    if step % config.checkpoints.every_steps == 0 or step == self._decay_start or last or stopping:
                        checkpoint = self._save(loader_state)  # before what takes long: a kill may follow a stop
                    if stopping and not last:
                        raise TrainingStopped(f"stopped after step {step}, and saved its checkpoint")
                    self._evaluate(step, last=last)
        except UnreadableError as unreadable:
            if state.step > self._saved_step:
                self._save(loader_state)
            raise store_lost(unreadable.error, config, state.step, self.world) from unreadable.error
        except Exception as error:
            self._rescue(loader_state, error)
            raise
        finally:
            stream.close()
        return self._summary(checkpoint)

    def _rescue(self, loader_state: dict[str, Any] | None, error: Exception) -> None:
        """A checkpoint after an error that left the state whole; none after the training's own errors, such as a loss
        that is not finite, and none of several processes, as the others wait elsewhere."""
        new = self.state.whole and self.state.step > self._saved_step
        if isinstance(error, TrainError) or self.world.size > 1 or not new:
            return
        try:
            self._check()
            self._save(loader_state)
            log.error("step %d is saved in a checkpoint after an error", self.state.step)
        except Exception as reason:  # noqa: BLE001 - the error that came first is the one to raise
            log.warning("step %d cannot be saved after an error: %s", self.state.step, reason)

    def _of_stores(self, evaluate: Callable[[TrainingContext], T]) -> T:
        """What `evaluate` makes of the stores, also if one was compacted, or made again with the same samples.

        Raises:
            UnreadableError: one cannot be read any more.
        """
        try:
            return evaluate(self.context)
        except UnreadableError as unreadable:
            stores, errors = self.context.stores, []
            if unreadable.error is not None:
                try:
                    online = self.context.encode is not None
                    stores = opened_again(stores, self.config, unreadable.error, online=online)
                except StoreLostError as error:
                    errors.append(error)
            agree(self.world, errors)
        self.context = replace(self.context, stores=stores)
        return evaluate(self.context)

    def _evaluate(self, step: int, *, last: bool) -> None:
        """Validation losses and grids, if it is their step."""
        validation, grid = self.config.validation, self.config.grid
        if validation.num_samples and (step % validation.every_steps == 0 or last):
            self._validate()
        if grid.every_steps and (step % grid.every_steps == 0 or last):
            self._write_grid()

    def _evaluate_what_is_due(self) -> None:
        """What a kill left out after the checkpoint that this start resumes from."""
        step, validation, grid = self.state.step, self.config.validation, self.config.grid
        last = step == self.config.num_steps
        if not step:
            return
        folder = self.out / "checkpoints"
        loss = validation_losses(folder).get(f"step-{step:08d}")
        loss, drawn = self.world.gather((loss, self._grid(step).exists()))[0]  # as the process sees it that writes
        self._keep(loss)  # which is perhaps known from the metrics alone
        if loss is None and validation.num_samples and (step % validation.every_steps == 0 or last):
            self._validate()
        if not drawn and grid.every_steps and (step % grid.every_steps == 0 or last):
            self._write_grid()

    def _grid(self, step: int) -> Path:
        return self.out / "grids" / f"step-{step:08d}.png"

    def _log(self, meter: Meter, waited_s: float, epochs: dict[str, float], on_progress: OnProgress | None) -> None:
        values = meter.values(waited_s) | epochs
        first = self.state.optimizer.param_groups[0]
        lr = first["lr"] / first["lr_scale"]
        self.loggers.scalars(
            self.state.step,
            {
                "samples": self.state.samples,
                **values,
                "lr": lr,
                **({} if self.state.loss_scale is None else {"loss_scale": self.state.loss_scale.value}),
                "peak_memory_bytes": peak_memory(self.world.device),
            },
        )
        self.last |= values
        if on_progress is not None and self.world.is_main:
            step, num_steps = self.state.step, self.config.num_steps
            remaining_s = (num_steps - step) * values["step_s"]
            on_progress(
                TrainingProgress(
                    step, num_steps, values["loss"], values["images_per_s"], values["loader_wait"], remaining_s
                )
            )

    @contextmanager
    def _evaluating(self, *, averaged: bool) -> Iterator[None]:
        """Within this block the model is in eval mode, with its slowest average of weights if `averaged`."""
        averages = self.state.averages
        self.context.denoiser.eval()
        try:
            with averages.applied(averages.slowest) if averaged and averages.slowest else nullcontext():
                yield
        finally:
            self.context.denoiser.train()

    def _validate(self) -> None:
        with self._evaluating(averaged=False):
            plain = self._of_stores(validation_metrics)
        with self._evaluating(averaged=True):
            averaged = self._of_stores(validation_metrics)
        values = {**averaged, "validation_loss_without_ema": plain["validation_loss"]}
        if isinstance(self.config.denoiser, PriorConfig):
            with self._evaluating(averaged=True):
                values |= self._of_stores(similarities)
        self._check()
        self.last |= values
        self.loggers.scalars(self.state.step, values)
        self._keep(values["validation_loss"])  # last: without it the validation is due when the training resumes

    def _write_grid(self) -> None:
        with self._evaluating(averaged=True):
            pixels = self._of_stores(sample_grid)
        self._check()
        if self.world.is_main:
            write_png(self._grid(self.state.step), pixels)
            self.loggers.image(self.state.step, "grid", pixels)

    def _record(self, loader_state: dict[str, Any] | None) -> dict[str, Any]:
        """What a checkpoint keeps beside the state."""
        store = next(iter(self.context.stores.values()))  # those of a mixture have the same shapes
        return {
            "loader": loader_state,
            "denoiser": _json(self.config.denoiser),
            **self.records,
            "shapes": [list(shape) for shape in trained_shapes(store, self.config)],
            "config": _json(self.config),
            "torch": torch.__version__,
        }

    def _save_snapshot(self) -> None:
        folder = self.out / SNAPSHOTS
        self.state.save_snapshot(folder, self._record(None), writes=self.world.is_main, check=self._check)

    def _save(self, loader_state: dict[str, Any] | None) -> Path | None:
        folder = self.out / "checkpoints"
        path = self.state.save(folder, self._record(loader_state), writes=self.world.is_main, check=self._check)
        self._saved_step = self.state.step
        self._keep()
        return path

    def _keep(self, loss: float | None = None) -> None:
        """Leaves the checkpoints to keep: what they are may change with each one, and with each loss that is known.

        Args:
            loss: the validation loss of this step's checkpoint, to be recorded.
        """
        folder, config = self.out / "checkpoints", self.config.checkpoints
        if self.world.is_main and loss is None:
            remove_old(folder, config.keep, config.keep_best, keep_step=self._decay_start)
        elif self.world.is_main and loss is not None:
            record_validation(folder, self.state.step, loss, config.keep, config.keep_best, self._decay_start)
        self.world.wait()

    def _summary(self, checkpoint: Path | None) -> dict[str, Any]:
        last = last_values(self.out / METRICS) | self.last  # this start may have had little left to do
        if checkpoint is None:  # saved earlier, or by the main process, perhaps in another folder
            checkpoint = next(reversed(checkpoints(self.out / "checkpoints")), None)
        return {
            "steps": self.state.step,
            "samples": self.state.samples,
            "loss": last.get("loss"),
            "validation_loss": last.get("validation_loss"),
            "images_per_s": last.get("images_per_s"),
            "loader_wait": last.get("loader_wait"),
            "peak_memory_bytes": peak_memory(self.world.device),
            **{name: value for name, value in last.items() if name.partition("/")[0] == "epoch"},
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "best_checkpoint": next(map(str, best_checkpoints(self.out / "checkpoints")), None),
        }


def _adapter_record(config: TrainConfig, base: Start | None) -> dict[str, Any]:
    """What checkpoints keep of an adapter and its base; nothing where all weights are trained."""
    if config.lora is None or base is None:
        return {}
    record = {"path": base.checkpoint, "step": base.step, "weights": base.weights, "sha256": base.sha256}
    return {"lora": {**_json(config.lora), "alpha": config.lora.scale_times_rank, "base": record}}


def _json(config: Any) -> dict[str, Any]:
    return config.model_dump(mode="json")
