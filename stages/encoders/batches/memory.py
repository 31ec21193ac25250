"""Continues with smaller batches when one does not fit into memory."""

import gc
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pipeline.errors import first_line
from pipeline.stage import note_progress

T = TypeVar("T")

log = logging.getLogger(__name__)

_PHRASES = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


@dataclass(slots=True)
class MemoryBoundBatches(Generic[T]):
    """The results of a model, batch by batch."""

    limit: int
    """The largest batch, in the unit of `split`; halved each time a batch did not fit."""
    halvings: int = 0
    """How often a batch did not fit into memory."""
    results: list[tuple[list[int], T]] = field(default_factory=list)
    """The items of each batch and the result of `forward` for them."""


def run_batches(
    items: Sequence[int],
    limit: int,
    split: Callable[[Sequence[int], int], list[list[int]]],
    forward: Callable[[list[int]], T],
) -> MemoryBoundBatches[T]:
    """Runs `forward` on `split(items, limit)`; when a batch does not fit into memory, continues with half the limit.

    Args:
        split: divides items into batches within a limit; an item over the limit is a batch by itself.

    Raises:
        MemoryError: not even one item fits.
    """
    done = MemoryBoundBatches[T](limit)
    waiting = deque(split(items, limit))
    while waiting:
        try:
            done.results.append((waiting[0], forward(waiting[0])))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(waiting[0]) == 1:
                raise MemoryError(f"a batch of one does not fit into memory ({first_line(error)})") from error
            done.limit, done.halvings = max(1, done.limit // 2), done.halvings + 1
            log.warning("out of memory (%s): batches of at most %d from now on", first_line(error), done.limit)
        else:
            waiting.popleft()
            note_progress()
            continue
        _release()  # now that the error no longer holds the batch's tensors
        waiting = deque(split([item for batch in waiting for item in batch], done.limit))
    return done


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES))


def _release() -> None:
    """Releases the memory that the allocator caches."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
