"""Limits on requests and money."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import EXIT_INCOMPLETE, PipelineError


class Price(Config):
    """The price of a million tokens, in whatever currency."""

    input: float = Field(ge=0)
    """Of prompts and images."""
    output: float = Field(ge=0)
    """Of answers."""

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """The price of these tokens."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


@dataclass(slots=True)
class Used:
    """Requests that were answered, and their tokens."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class LimitReachedError(PipelineError):
    """A limit on requests or money was reached; the same command goes on once it is raised."""

    exit_code = EXIT_INCOMPLETE


class Budget:
    """Counts requests and money, and says when no further request may be made."""

    def __init__(
        self,
        name: str,
        max_tokens: int,
        max_requests: int | None,
        max_cost: float | None,
        price: Price | None,
        used: Callable[[], Used],
    ):
        self._name, self._max_tokens = name, max_tokens
        self._max_requests, self._max_cost, self._price = max_requests, max_cost, price
        self._used = used() if max_requests is not None or max_cost is not None else Used()
        self._begun = 0
        self._most_in = 0
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Before a request: whether it may be made now. If not, it may be once others have ended.

        Raises:
            LimitReachedError: it would be more than the limit allows.
        """
        with self._lock:
            used, others = self._used, self._begun
            if self._max_requests is not None and used.requests + others >= self._max_requests:
                if used.requests < self._max_requests:
                    return False
                raise LimitReachedError(
                    f"captioners.{self._name}.max_requests: {used.requests:,} requests were answered; raise it and "
                    "run the same command again to go on"
                )
            if self._max_cost is not None and self._price is not None:
                spent = self._price.of(used.tokens_in, used.tokens_out)
                left = self._max_cost - spent
                one = self._price.of(self._most_in, self._max_tokens)
                if (others + 1) * one > left:
                    if others and one <= left:
                        return False
                    raise LimitReachedError(
                        f"captioners.{self._name}.max_cost: {spent:.4g} was spent on {used.requests:,} requests, and "
                        f"one more might exceed {self._max_cost:g}; raise it and run the same command again to go on"
                    )
            self._begun += 1
            return True

    def end(self, tokens_in: int = 0, tokens_out: int = 0, *, answered: bool) -> None:
        """After a request."""
        with self._lock:
            self._begun -= 1
            if answered:
                self.note(tokens_in, tokens_out)

    def note(self, tokens_in: int, tokens_out: int) -> None:
        """Counts an answer."""
        self._used.requests += 1
        self._used.tokens_in += tokens_in
        self._used.tokens_out += tokens_out
        self._most_in = max(self._most_in, tokens_in)

    def expect(self, tokens_in: int) -> None:
        """Tells how many tokens a request has, before the first."""
        self._most_in = max(self._most_in, tokens_in)

    @property
    def needs_tokens(self) -> bool:
        """Whether the tokens of each request must be known."""
        return self._max_cost is not None
