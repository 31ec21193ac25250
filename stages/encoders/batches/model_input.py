"""What a model reads for each caption, and which of its rows are stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The tokens of one caption, with template and padding, and which of their states are kept."""

    ids: list[int]
    """Every token the model reads; empty if nothing of the caption is left."""
    masked: tuple[int, int] = (0, 0)
    """Places [start, stop) of padding that no token attends to; its own states are kept all the same."""
    head: int = 0
    """Rows kept from the beginning."""
    start: int = 0
    """The other rows are kept from here on."""
    tail: int = 0
    """Last rows that are not kept."""
    zeros_before: int = 0
    zeros_after: int = 0
    """Rows of zeros around the states, which the model does not compute."""

    @property
    def num_rows(self) -> int:
        """Rows that are stored; 0 if nothing of the caption is left."""
        if not self.ids:
            return 0
        return self.zeros_before + self.head + len(self.ids) - self.start - self.tail + self.zeros_after

    def kept(self, states: np.ndarray) -> np.ndarray:
        """float (len(ids), dim) -> (num_rows, dim)."""
        if not (self.start or self.tail or self.zeros_before or self.zeros_after):
            return states
        before, after = (np.zeros((n, states.shape[1]), states.dtype) for n in (self.zeros_before, self.zeros_after))
        return np.concatenate([before, states[: self.head], states[self.start : len(states) - self.tail], after])


CaptionReader = Callable[[Sequence[str]], tuple[list[ModelInput], int]]
"""Turns captions into inputs of a model; also returns how many were truncated."""
