"""Which marks of a run folder on an object store count: a late one, of a run that lost the folder, does not.

A mark is a file that declares the files next to it complete. A run writes down each mark before it sends it, in
`.sent-NUMBER.json`, under a number that no other run of the folder has. What the run before it has written down and
not sent is late if it comes after all: a process that was suspended in the middle of sending it has sent it since.
"""

import re
from collections.abc import Collection

from pipeline.storage.base import Storage
from pipeline.storage.files import json_text

_INDEX = re.compile(r"\.sent-(\d{6,})\.json")


class Marks:
    """The marks of this run and of those before it.

    Attributes:
        late: names of the marks that do not count.
        before: the owner of the run before this one, once read; empty if there was none.
    """

    def __init__(self, storage: Storage, owner: str = ""):
        self.storage, self.owner = storage, owner
        self.late: set[str] = set()
        self.before = ""
        self._numbers: list[int] = []
        self._number = 0
        self._sent: set[str] = set()

    def read(self, present: Collection[str]) -> None:
        """Reads the index of the newest run.

        Args:
            present: names of the marks that are there.
        """
        self._numbers = [int(match[1]) for match in map(_INDEX.fullmatch, self.storage.names("")) if match]
        index = self.storage.read_json_if_whole(_name(max(self._numbers))) if self._numbers else None
        index = index if isinstance(index, dict) else {}
        late, sent = set(index.get("late", ())), set(index.get("sent", ()))
        self.late = late | (sent - set(present))
        self.before = str(index.get("owner", ""))
        self._sent = set(present) - self.late

    def claim(self) -> None:
        """Takes the next number, after `read`: from now on the index of no earlier run counts."""
        self._number = max(self._numbers, default=0) + 1
        while not self.storage.create(_name(self._number), self._content()):
            self._number += 1
        for number in self._numbers:
            self.storage.delete(_name(number))

    def write_down(self, mark: str) -> None:
        """To be called before a mark is sent."""
        if mark not in self._sent:
            self._sent.add(mark)
            self.late.discard(mark)
            self.storage.write(_name(self._number), self._content())

    def forget(self, mark: str) -> None:
        """To be called after a mark was deleted; remembered from the next `write_down` on."""
        self._sent.discard(mark)

    def _content(self) -> bytes:
        index = {"owner": self.owner, "sent": sorted(self._sent), "late": sorted(self.late)}
        return json_text(index).encode()


def is_index(name: str) -> bool:
    """Whether a file in a run folder is such a list."""
    return _INDEX.fullmatch(name) is not None


def _name(number: int) -> str:
    return f".sent-{number:06d}.json"
