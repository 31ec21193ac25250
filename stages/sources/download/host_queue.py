"""Which URL a thread fetches next, so that no host gets too much, or holds up the others."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from threading import Condition
from urllib.parse import urlsplit

from stages.sources.download.config import DownloadConfig


@dataclass(slots=True)
class Ticket:
    """A URL to fetch now; or, with a verdict, one that is not to be fetched (any more)."""

    key: int
    url: str
    tries: int = 0
    """Fetches so far."""
    message: str | None = None
    """Why the last of them failed."""
    verdict: str | None = None
    """Why there will be no further one."""


@dataclass(slots=True, eq=False)
class _Host:
    name: str
    waiting: list[tuple[float, int, Ticket]] = field(default_factory=list)
    """Heap by the time from which a turn may be taken."""
    active: int = 0
    next_at: float = 0.0
    failures: int = 0
    """Failures in a row."""
    listed: bool = False
    """Whether the host stands in the list of hosts that may have a turn."""
    abandoned: str | None = None


class HostQueue:
    """The URLs of a shard, for many threads, which give back a URL that they took, unless it is done.

    A thread that takes until it has a result does not wait for ever: there are at least as many URLs without a result
    as threads that want one.

    Args:
        urls: key -> URL.
        clock: seconds, never going back.
    """

    def __init__(self, urls: Mapping[int, str], config: DownloadConfig, clock: Callable[[], float] = time.monotonic):
        self._config = config
        self._clock = clock
        self._changed = Condition()
        self._order = count()
        self._ready: list[tuple[float, int, _Host]] = []
        """Heap by time of the hosts with waiting turns and fewer than `max_per_host` active."""
        self._abandoned: deque[Ticket] = deque()
        self._hosts: dict[str, _Host] = {}
        for key, url in urls.items():
            host = self._host(url)
            heappush(host.waiting, (0.0, next(self._order), Ticket(key, url)))
            self._sort_out(host)

    def take(self) -> Ticket:
        """The next URL whose host may have one more download; waits for it."""
        with self._changed:
            while not self._abandoned:
                now = self._clock()
                if not self._ready or self._ready[0][0] > now:
                    self._changed.wait(self._ready[0][0] - now if self._ready else None)
                    continue
                host = heappop(self._ready)[2]
                host.listed = False
                if host.waiting and max(host.next_at, host.waiting[0][0]) <= now:
                    turn = heappop(host.waiting)[2]
                    host.active += 1
                    host.next_at = now + self._config.min_interval_s
                    self._sort_out(host)
                    return turn
                self._sort_out(host)
            return self._abandoned.popleft()

    def give_back(
        self, turn: Ticket, *, failed: bool | None = None, pause_s: float = 0.0, retry_in_s: float | None = None
    ) -> None:
        """Ends a turn that was taken.

        Args:
            failed: whether the host could not be reached or requested a pause; None if nothing is known about it.
            pause_s: the requested pause.
            retry_in_s: seconds after which the URL may be taken again; None for never.
        """
        with self._changed:
            now = self._clock()
            host = self._host(turn.url)
            host.active -= 1
            host.next_at = max(host.next_at, now + pause_s)
            if failed is not None:
                host.failures = host.failures + 1 if failed else 0
            if retry_in_s is not None:
                heappush(host.waiting, (now + retry_in_s, next(self._order), turn))
            if pause_s > self._config.max_retry_after_s:
                host.abandoned = (
                    host.abandoned or f"host_unreachable: {host.name} requested a pause of {pause_s:.0f} s"
                )
            elif host.failures >= self._config.max_host_failures:
                host.abandoned = (
                    host.abandoned or f"host_unreachable: {host.name} failed {host.failures} times in a row"
                )
            self._sort_out(host)
            self._changed.notify_all()

    def give_up(self, message: str) -> None:
        """Ends the waiting of all turns, present and future."""
        with self._changed:
            for host in self._hosts.values():
                host.abandoned = host.abandoned or message
                self._sort_out(host)
            self._changed.notify_all()

    def _sort_out(self, host: _Host) -> None:
        """Lists the host if it may have a turn now or later; ends its turns if it was given up."""
        if host.abandoned is not None:
            for _, _, turn in host.waiting:
                turn.verdict = turn.message or host.abandoned
                self._abandoned.append(turn)
            host.waiting.clear()
        elif host.waiting and not host.listed and host.active < self._config.max_per_host:
            heappush(self._ready, (max(host.next_at, host.waiting[0][0]), next(self._order), host))
            host.listed = True

    def _host(self, url: str) -> _Host:
        name = host_of(url)
        return self._hosts.setdefault(name, _Host(name))


def host_of(url: str) -> str:
    """`name` or `name:port`, without a user and without the usual ports."""
    name = urlsplit(url).netloc.rpartition("@")[2].lower()
    return name.removesuffix(":80").removesuffix(":443").removesuffix(":").removesuffix(".")
