"""One optimizer step: forward and backward passes over the micro-batches of a batch, and the update."""

import faulthandler
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagen_core.sealed import write_sealed
from imagen_core.train.checkpoints.state import TrainState
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.example import make_example
from imagen_core.train.data.randomness import RandomStream, mix
from imagen_core.train.data.stream import Batch
from imagen_core.train.errors import NonFiniteLossError
from imagen_core.train.optimizer import learning_rate
from imagen_core.train.parallel.world import local, unsharded
from imagen_core.train.parallel.wrap import syncing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed, the same on every process.

    Attributes:
        loss: mean over the global batch.
        grad_norm: of the gradients before clipping; not finite in a skipped step of float16.
        stopping: whether any process wants to stop.
        lost: whether any process could not read its part of the batch; then nothing was changed.
        alignment: mean cosine to the encoder's features; None in a step that is not aligned.
    """

    loss: float
    grad_norm: float
    stopping: bool
    lost: bool = False
    alignment: float | None = None


def take_step(context: TrainingContext, state: TrainState, batch: Batch, out: Path, *, stop: bool) -> StepResult:
    """Changes the weights by one batch; `stop`: this process wants to stop after it.

    Raises:
        NonFiniteLossError: the batch's keys are in `out/nan/`, the weights are unchanged.
    """
    config, world = context.config, context.world
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, state.step, config.num_steps) * group["lr_scale"]
    torch.manual_seed(mix(config.seed, RandomStream.NETWORK_DROPOUT, state.step, world.rank))

    scale = 1.0 if state.loss_scale is None else state.loss_scale.value
    total, aligned, recorded = _backward(context, state, batch, scale)
    norm = _clip_gradients(context, scale)
    broken = (~torch.isfinite(total + norm)).double()
    flags = total.new_tensor([float(stop), float(batch.error is not None)])
    sums = torch.cat([torch.stack([total, norm.double() / world.size, broken]), flags, aligned[None]])
    sums = world.sum(torch.cat([sums, recorded.flatten()])).tolist()  # the one time a step waits for the GPU
    (loss, norm, broken, stopping, lost, cosine), sums = sums[:6], sums[6:]
    if lost:
        state.optimizer.zero_grad(set_to_none=True)
        return StepResult(math.nan, math.nan, stopping > 0, lost=True)

    mean_loss = loss / batch.global_size
    overflow = state.loss_scale is not None and math.isfinite(mean_loss) and scale > 1
    if broken and not overflow:
        _report_non_finite(context, state.step, batch, mean_loss, norm, out)
    is_aligned = config.alignment is not None and config.alignment.acts(state.step)
    state.whole = False
    _update(state, batch, config.ema.every_steps, broken=bool(broken))
    losses, steps = sums[: recorded.shape[1]], sums[recorded.shape[1] :]
    state.noise_levels.record([(int(step) - 1, value) for step, value in zip(steps, losses, strict=True) if step])
    state.whole = True
    return StepResult(mean_loss, norm, stopping > 0, alignment=cosine / batch.global_size if is_aligned else None)


def _backward(
    context: TrainingContext, state: TrainState, batch: Batch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulates the gradients of a batch, times `scale`.

    Returns:
        The sums of this process's losses and of its cosines to the encoder's features, float64; and loss and step of
        the schedule + 1 of each sample of the global batch, (2, samples), with zeros for the samples of other
        processes; (2, 0) where the noise levels do not learn.
    """
    config, world, learns = context.config, context.world, state.noise_levels.learns
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    aligned = torch.zeros_like(total)
    most = batch.largest_part  # all processes take the same number of micro-batches
    size = config.micro_batch_size or most
    starts = range(0, most, size)
    recorded = total.new_zeros(2, world.size * most if learns else 0)
    for start in starts:
        part = batch.part(start, start + size)
        example = make_example(
            part, config, context.denoiser, world.device, state.step, state.noise_levels, context.null_text
        )
        with syncing(context.loss, config, start == starts[-1]):
            losses, cosines = context.loss(example)
            if learns:
                count, first = len(part.keys), world.rank * most + start
                recorded[0, first : first + count] = losses.detach()[:count]
                recorded[1, first : first + count] = state.noise_levels.steps(example.sigma)[:count] + 1
            losses = minimized = losses * example.weight
            if cosines is not None and config.alignment is not None:
                minimized = losses - config.alignment.weight * cosines
            if not part.keys:  # this process has no sample of the batch, but takes part in the collectives
                losses, minimized, cosines = losses * 0, minimized * 0, None
            # Processes average their gradients: the mean over the global batch needs its size, not ours.
            (minimized.sum() * (world.size / batch.global_size * scale)).backward()
        total += losses.detach().sum().double()
        if cosines is not None:
            aligned += cosines.detach().sum().double()
    return total, aligned, recorded


def _clip_gradients(context: TrainingContext, scale: float) -> Tensor:
    """Divides the gradients by `scale` and clips them; returns their norm before clipping."""
    if scale != 1:
        gradients = [local(p.grad) for p in context.loss.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / scale)  # pyright: ignore[reportPrivateImportUsage]
    clip_norm = context.config.optimizer.clip_norm
    return unsharded(nn.utils.clip_grad_norm_(context.loss.parameters(), clip_norm, foreach=True))


def _update(state: TrainState, batch: Batch, ema_every_steps: int, *, broken: bool) -> None:
    """The optimizer's step, unless gradients are `broken`, and everything that follows it."""
    if not broken:
        state.optimizer.step()
    if state.loss_scale is not None and broken:
        state.loss_scale.shrink()
    elif state.loss_scale is not None:
        state.loss_scale.grow()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.samples += batch.global_size
    counts = state.step % ema_every_steps == 0
    if not broken and (counts or state.averages.updates == 0):
        state.averages.update(counts=counts)


def _report_non_finite(context: TrainingContext, step: int, batch: Batch, loss: float, norm: float, out: Path) -> None:
    """Writes the keys of the batch, and raises."""
    path = out / "nan" / f"step-{step:08d}.json"
    keys = [key for part in context.world.gather(batch.keys) for key in part]
    if context.world.is_main:
        report: dict[str, Any] = {"step": step, "loss": str(loss), "grad_norm": str(norm), "keys": keys}
        write_sealed(path, report)
    raise NonFiniteLossError(
        f"step {step}: loss {loss}, gradient norm {norm}, not finite; the batch's keys are in {path}. Resume from the "
        "last checkpoint, or start again, with a lower optimizer.lr or without these samples"
    )


@contextmanager
def step_limit(limit_s: float | None, step: int) -> Iterator[None]:
    """Ends this process, with exit code 75, where the block takes longer; None: no limit.

    What hangs may be a call that no exception interrupts, and other processes may wait for this one.
    """
    if limit_s is None:
        yield
        return
    timer = threading.Timer(limit_s, _end, [limit_s, step])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(limit_s: float, step: int) -> None:
    log.error(
        "compute.step_limit_s: step %d takes more than %g s; this process ends here: run the same command again to go "
        "on from the newest checkpoint, or raise the limit",
        step,
        limit_s,
    )
    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    os._exit(os.EX_TEMPFAIL)
