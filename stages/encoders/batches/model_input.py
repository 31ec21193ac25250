"""What a model reads for each caption, and which of its rows are stored."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

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

    def begins_with(self, shared: Sequence[int]) -> bool:
        """Whether these tokens come first, before others, and are attended to."""
        count, (start, stop) = len(shared), self.masked
        apart = start == stop or start >= count
        return len(self.ids) > count and apart and self.ids[:count] == list(shared)

    def kept(self, states: np.ndarray, shared: np.ndarray | None = None) -> np.ndarray:
        """float (len(ids), dim) -> (num_rows, dim).

        Args:
            shared: float (n, dim), the states of the first tokens, if `states` has those of the others only.
        """
        shared = states[:0] if shared is None else shared
        count, end = len(shared), len(shared) + len(states) - self.tail
        if not (count or self.start or self.tail or self.zeros_before or self.zeros_after):
            return states
        before, after = (np.zeros((n, states.shape[1]), states.dtype) for n in (self.zeros_before, self.zeros_after))
        head, rest = (
            (shared[start:stop], states[max(0, start - count) : max(0, stop - count)])
            for start, stop in ((0, self.head), (self.start, end))
        )
        return np.concatenate([before, *head, *rest, after])


CaptionReader = Callable[[Sequence[str]], tuple[list[ModelInput], int]]
"""Turns captions into inputs of a model; also returns how many were truncated."""

DIFFERENT_CAPTIONS = ("a", "Z", "3", '"')
"""What all of them begin with is of the template. A caption that does not begin with it is encoded whole."""
_LEAST_SHARED = 16
"""Tokens from which on it is worth it to run them once."""


def common_start(all_ids: Iterable[Sequence[int]]) -> list[int]:
    """The tokens that all of them begin with; none of no texts."""
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*all_ids, strict=False))]


def template_start(read: CaptionReader) -> list[int]:
    """The tokens that captions begin with, whatever they say; none if they are few."""
    found = common_start(each.ids for each in read(DIFFERENT_CAPTIONS)[0] if each.ids)
    return found if len(found) >= _LEAST_SHARED else []
