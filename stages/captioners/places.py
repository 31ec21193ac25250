"""Divides the places for requests among the shards that a worker asks about at the same time."""

import threading
from types import TracebackType
from typing import Self

_SHARE = 3


class Places:
    """Places for requests, one for each that is made or ready to be made.

    The shards that want places get unequal parts of them: the one that began first up to all, each further one a
    third of the one before it. So they do not end at the same time, and while the last answers about one are waited
    for, the servers have requests about the others. Where the servers wait for images to be prepared, places are free
    and all shards prepare some.
    """

    def __init__(self, count: int):
        self.count = count
        self.free = count
        self.calls: list[Call] = []
        """In order of their begin."""
        self.changed = threading.Condition()


class Call:
    """One shard's part of the places; a context manager."""

    def __init__(self, places: Places):
        self._places = places
        self._held = 0
        self._wants = False

    def __enter__(self) -> Self:
        with self._places.changed:
            self._places.calls.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._places.changed:
            self._places.calls.remove(self)

    def take(self, *, wait: bool) -> bool:
        """Takes a place.

        Args:
            wait: until there is one.
        Returns:
            Whether there was one.
        """
        places = self._places
        with places.changed:
            self._wants = True
            while not places.free or self._held >= self._most():
                if not wait:
                    return False
                places.changed.wait()
            places.free -= 1
            self._held += 1
            return True

    def give_back(self, *, wants_more: bool = True) -> None:
        """Gives a place back; any thread may.

        Args:
            wants_more: False if the shard has no question now, so that it stands in no other's way.
        """
        places = self._places
        with places.changed:
            self._held -= 1
            self._wants &= wants_more
            places.free += 1
            places.changed.notify()

    def _most(self) -> int:
        places = self._places
        before = sum(call._wants for call in places.calls[: places.calls.index(self)])
        return max(1, places.count // _SHARE**before)
