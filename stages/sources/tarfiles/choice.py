"""Which member of a sample is its image, its caption, its label."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from stages.sources.folder import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from stages.sources.tarfiles.index import Members
from stages.sources.tarfiles.opening import Span

CONTENT = ("image", "txt", "json", "cls")
PICKLES = ("pickle", "pkl")
_ALWAYS_ARRAYS = ("npy", *PICKLES)


class Ambiguous(Exception):
    """A sample has several members that could be the same thing."""


@dataclass(frozen=True)
class MemberChoice:
    """The suffixes that are configured; each may be several, of which the first that a sample has is taken."""

    image: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    arrays: frozenset[str] = field(default_factory=frozenset)

    def of(self, members: Members) -> dict[str, Span]:
        """The places of `image`, `txt`, `json` and `cls`, and of the arrays by suffix; what is not there is left out.

        Raises:
            Ambiguous: names the members and the key that decides between them.
        """
        image = self._image(members)
        before = "" if image is None else image[: len(image) - len(image.rpartition(".")[2])]
        chosen = {
            "image": image,
            "txt": self._named(members, self.caption, "txt", before, "caption_member"),
            "json": self._named(members, (), "json", before, ""),
            "cls": self._named(members, self.label, "cls", before, "label_member"),
        }
        kinds = {suffix: kind for kind, suffix in chosen.items() if suffix is not None}
        found: dict[str, Span] = {}
        for suffix, span in members.items():
            if suffix in kinds:
                found[kinds[suffix]] = span
            elif _last(suffix) in _ALWAYS_ARRAYS or suffix.lower() in self.arrays:
                found.setdefault(suffix.lower(), span)
        return found

    def _image(self, members: Members) -> str | None:
        if self.image:
            return _first_of(members, self.image, "image_member")
        for suffixes in (IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES):
            images = [suffix for suffix in members if f".{_last(suffix)}" in suffixes]
            if images:
                return _only(images, "image_member")
        return None

    def _named(self, members: Members, configured: Sequence[str], usual: str, before: str, setting: str) -> str | None:
        """The configured member; without one KEY.txt, or where the image is KEY.v2.jpg also KEY.v2.txt."""
        return _first_of(members, configured or (usual, f"{before}{usual}"), setting, exactly=bool(configured))


def _first_of(members: Members, wanted: Sequence[str], setting: str, *, exactly: bool = True) -> str | None:
    """The first of the wanted suffixes that a sample has; upper and lower case count as equal, exact ones go first."""
    for suffix in wanted:
        if exactly and suffix in members:
            return suffix
        if spelled := [other for other in members if other.lower() == suffix.lower()]:
            return _only(spelled, setting)
    return None


def _only(suffixes: Sequence[str], setting: str) -> str:
    if len(suffixes) == 1:
        return suffixes[0]
    listed = " and ".join(f".{suffix}" for suffix in suffixes[:3])
    which = f"say which one by source.{setting}={suffixes[0]}, or" if setting else "rename one, or"
    raise Ambiguous(f"{listed}; {which} set source.key_ends_at=last_dot if keys have dots")


def _last(suffix: str) -> str:
    return suffix.lower().rpartition(".")[2]
