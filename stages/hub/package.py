"""What is pushed: files with their sha256, and a card."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CARD = "README.md"
UNKNOWN = "unknown"
"""The licence of what nobody gave one; the hub has this value too."""
RepositoryType = Literal["dataset", "model"]


@dataclass(frozen=True, slots=True)
class Form:
    """One of the forms that things have in a repository.

    Attributes:
        name: in messages.
        head: the file that is pushed last, so that a repository with it is complete.
    """

    name: str
    repo_type: RepositoryType
    head: str

    @property
    def words(self) -> str:
        """The name with its article."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


STORE = Form("store", "dataset", "manifest.json")
EXPORT = Form("export", "dataset", "data/store.json")
MODEL = Form("model", "model", "model.safetensors")
DIFFUSERS = Form("diffusers folder", "model", "model_index.json")
FORMS = (STORE, EXPORT, MODEL, DIFFUSERS)


@dataclass(frozen=True, slots=True)
class Item:
    """One file: its name in the repository, which is its name in the folder too, and its bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Package:
    """All that is pushed.

    Attributes:
        items: the files, without the card.
        open: gives a local path of a file while the block runs; ConfigError unless it has exactly these bytes.
        card: the text of the card, of (repository, licence).
        confirm: called before the head is pushed; raises ConfigError if the place was changed since it was looked at.
        owned: names in a repository that belong to this form, so that those which are no longer among the items are
            deleted; None deletes nothing.
        notes: for the person who pushes.
    """

    form: Form
    items: Sequence[Item]
    open: Callable[[Item], AbstractContextManager[Path]]
    card: Callable[[str, str], str]
    confirm: Callable[[], None] = lambda: None
    owned: re.Pattern[str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the card."""
        return sum(item.bytes for item in self.items)
