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

_STUCK_PER_THREAD = 3
"""Downloads that get nowhere, for each that does: so many may be waited for beside `threads` others."""
_PATIENCE_S = 2.0
"""So long may a download get nowhere before it stops to count as one of `threads`."""


Failures = dict[str, tuple[int, float]]
"""Host -> its failures in a row, and the time of the last of them; the latest last."""
_REMEMBERED_S = 600.0
_MOST_REMEMBERED = 10_000


def num_threads(config: DownloadConfig) -> int:
    """Threads that a queue of this configuration keeps busy at most."""
    return config.threads * (1 + _STUCK_PER_THREAD)


@dataclass(slots=True)
class Ticket:
    """A URL to fetch now; or, with a verdict, one that is not to be fetched (any more)."""

    key: int
    url: str
    tries: int = 0
    """Fetches so far."""
    spent_s: float = 0.0
    """Seconds that they took, with the pauses between them."""
    message: str | None = None
    """Why the last of them failed."""
    verdict: str | None = None
    """Why there will be no further one."""
    received: Callable[[], int] = int
    """Bytes received so far by the fetch in progress."""
    fetched: bool = False
    """The fetch has ended; its result is about to be handed on."""
    seen: int = 0
    """Bytes received when the queue last looked."""
    aside: bool = False
    """It does not count as one of `threads`: its host is in doubt, or it gets nowhere."""


@dataclass(slots=True, eq=False)
class _Host:
    name: str
    waiting: list[tuple[float, int, Ticket]] = field(default_factory=list)
    """Heap by the time from which a turn may be taken."""
    active: int = 0
    next_at: float = 0.0
    failures: int = 0
    """Failures in a row."""
    listed: bool | None = None
    """In which list of hosts that may have a turn it stands."""
    abandoned: str | None = None

    @property
    def in_doubt(self) -> bool:
        return self.failures > 0


class HostQueue:
    """The URLs of a shard, for many threads, which give back a URL that they took, unless it is done.

    At most `threads` downloads run at once, and beside them some of hosts that failed last, or that get nowhere: so
    bad hosts do not hold up the good ones.

    A thread that takes until it has a result does not wait for ever: there are at least as many URLs without a result
    as threads that want one.

    Args:
        urls: key -> URL.
        clock: seconds, never going back.
        failures: of hosts, from earlier queues; kept up to date. A host that was given up gets one more chance.
    """

    def __init__(
        self,
        urls: Mapping[int, str],
        config: DownloadConfig,
        clock: Callable[[], float] = time.monotonic,
        failures: Failures | None = None,
    ):
        self._config = config
        self._clock = clock
        self._failures = {} if failures is None else failures
        self._changed = Condition()
        self._order = count()
        self._ready: dict[bool, list[tuple[float, int, _Host]]] = {False: [], True: []}
        """Heaps by time of the hosts with waiting turns and fewer than `max_per_host` active; True: those in doubt."""
        self._active = {False: 0, True: 0}
        """Downloads in progress; True: those set aside."""
        self._most = {False: config.threads, True: num_threads(config) - config.threads}
        self._watched: list[tuple[float, int, Ticket, int]] = []
        """Heap by the time at which to look whether a download in progress gets somewhere; with its tries so far."""
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
                self._set_aside(now)
                host = self._next_host(now)
                if host is None:
                    times = [heap[0][0] for aside, heap in self._ready.items() if heap and self._has_room(aside)]
                    times += [time for time, *_ in self._watched[:1]]
                    self._changed.wait(max(0.0, min(times) - now) if times else None)
                    continue
                turn = heappop(host.waiting)[2]
                turn.aside, turn.fetched, turn.received, turn.seen = host.in_doubt, False, int, 0
                self._active[turn.aside] += 1
                if not turn.aside:
                    self._watch(turn, now)
                host.active += 1
                host.next_at = now + self._config.min_interval_s
                self._sort_out(host)
                self._changed.notify()  # there may be a turn for another thread too
                return turn
            return self._abandoned.popleft()

    def _has_room(self, aside: bool) -> bool:
        return self._active[aside] < self._most[aside]

    def _next_host(self, now: float) -> _Host | None:
        """Takes the host whose turn it is now off the list, those in doubt last."""
        for aside, heap in self._ready.items():
            while self._has_room(aside) and heap and heap[0][0] <= now:
                host = heappop(heap)[2]
                host.listed = None if host.listed == aside else host.listed
                if (
                    host.waiting
                    and host.in_doubt == aside
                    and host.active < self._config.max_per_host
                    and max(host.next_at, host.waiting[0][0]) <= now
                ):
                    return host
                self._sort_out(host)
        return None

    def _watch(self, turn: Ticket, now: float) -> None:
        heappush(self._watched, (now + _PATIENCE_S, next(self._order), turn, turn.tries))

    def _set_aside(self, now: float) -> None:
        """Sets the downloads aside that get nowhere, so that others may start in their place."""
        least = max(1.0, self._config.min_bytes_per_s * _PATIENCE_S)
        while self._watched and self._watched[0][0] <= now:
            *_, turn, tries = heappop(self._watched)
            if turn.fetched or turn.aside or turn.tries != tries:
                continue
            received = turn.received()
            if received - turn.seen < least:
                turn.aside = True
                self._active[False] -= 1
                self._active[True] += 1
            else:
                turn.seen = received
                self._watch(turn, now)

    def give_back(
        self, turn: Ticket, *, failed: bool | None = None, pause_s: float = 0.0, retry_in_s: float | None = None
    ) -> None:
        """Ends a turn that was taken, once it counts its try.

        Args:
            failed: whether the host could not be reached or requested a pause; None if nothing is known about it.
            pause_s: the requested pause.
            retry_in_s: seconds after which the URL may be taken again; None for never.
        """
        with self._changed:
            now = self._clock()
            host = self._host(turn.url)
            host.active -= 1
            self._active[turn.aside] -= 1
            turn.fetched = True
            host.next_at = max(host.next_at, now + pause_s)
            if failed is not None:
                host.failures = host.failures + 1 if failed else 0
                self._remember(host, now)
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
            self._changed.notify(len(self._abandoned) + 1)

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
        elif host.waiting and host.listed != host.in_doubt and host.active < self._config.max_per_host:
            at = max(host.next_at, host.waiting[0][0])
            heappush(self._ready[host.in_doubt], (at, next(self._order), host))
            host.listed = host.in_doubt

    def _host(self, url: str) -> _Host:
        name = host_of(url)
        if name not in self._hosts:
            failures, at = self._failures.get(name, (0, 0.0))
            recent = failures if self._clock() - at < _REMEMBERED_S else 0
            self._hosts[name] = _Host(name, failures=min(recent, self._config.max_host_failures - 1))
        return self._hosts[name]

    def _remember(self, host: _Host, now: float) -> None:
        self._failures.pop(host.name, None)
        if host.failures:
            self._failures[host.name] = host.failures, now
        while len(self._failures) > _MOST_REMEMBERED:
            names = list(self._failures)  # at once: queues of other shards may change it meanwhile
            self._failures.pop(names[0], None)


def host_of(url: str) -> str:
    """`name` or `name:port`, without a user and without the usual ports."""
    name = urlsplit(url).netloc.rpartition("@")[2].lower()
    return name.removesuffix(":80").removesuffix(":443").removesuffix(":").removesuffix(".")
