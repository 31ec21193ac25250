"""How fast a run is, from the ends of its tasks: in bounded memory, however long it goes."""

from collections import deque

_MOST_BINS = 240
_RECENT_S = 60.0
_MOST_RECENT = 20_000


class Bins:
    """Counts over time in at most 240 equal intervals, which double in length as time goes on."""

    def __init__(self, start: float):
        """`start`: Unix time at which the first interval begins."""
        self.start = start
        self.width_s = 1.0
        self.counts = [0.0]

    def add(self, end: float, count: float, seconds: float = 0.0) -> None:
        """Counts what was made in the `seconds` before a Unix time, evenly; nothing counts before the start."""
        end = max(end, self.start)
        begin = max(end - seconds, self.start)
        while (last := int((end - self.start) / self.width_s)) >= _MOST_BINS:
            pairs = zip(self.counts[::2], [*self.counts[1::2], 0.0], strict=False)
            self.counts = [first + second for first, second in pairs]
            self.width_s *= 2
        self.counts += [0.0] * (last + 1 - len(self.counts))
        if begin == end:
            self.counts[last] += count
            return
        for place in range(int((begin - self.start) / self.width_s), last + 1):
            left = self.start + place * self.width_s
            share = min(end, left + self.width_s) - max(begin, left)
            self.counts[place] += count * max(0.0, share) / (end - begin)

    def rates(self, end: float) -> list[tuple[float, float]]:
        """The start of each interval until `end` and its counts per second, where it has begun long enough before."""
        self.add(end, 0.0)
        rates = []
        for place, count in enumerate(self.counts):
            start = self.start + place * self.width_s
            length = min(self.width_s, end - start)
            if count or length > self.width_s / 10 or not place:
                rates.append((start, count / (length if length > self.width_s / 10 else self.width_s)))
        return rates


class RecentTasks:
    """The tasks that ended in the last minute, or the last 20,000 of them."""

    def __init__(self) -> None:
        self._tasks: deque[tuple[float, float]] = deque(maxlen=_MOST_RECENT)

    def add(self, end: float, seconds: float) -> None:
        """A task ended at this Unix time after so many seconds."""
        self._tasks.append((end, seconds))
        while self._tasks[0][0] < end - _RECENT_S:
            self._tasks.popleft()

    def busy(self, started: float | None, now: float | None) -> float:
        """How many workers were busy with tasks that have ended, on average over the minute before `now`, or since
        the run started."""
        if now is None:
            return 0.0
        since = max(now - _RECENT_S, started or 0.0)
        if now <= since:
            return 0.0
        busy_s = sum(max(0.0, min(end, now) - max(end - seconds, since)) for end, seconds in self._tasks)
        return busy_s / (now - since)
