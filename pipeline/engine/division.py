"""How the work of a run is divided among several drivers: `parts/plan.json`, and who has done what.

The first driver that comes counts the input and writes the division; the others take it from there, so it does not
matter in which order they start. Part K of N has the K-th of N ranges of the shards; where a folder has finished
shards before, their range and that of the others are divided each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import ConfigError, StaleOutputError
from pipeline.fingerprint import differences
from pipeline.options import Part
from pipeline.plan import InputCounts
from pipeline.storage.files import damaged
from pipeline.storage.lock import PARTS, running_parts
from pipeline.storage.run_folder import DIVISION, RunFolder

_REMEDY = "delete it: the next `pipeline run --part` writes it again, and every part has to be run again"


@dataclass(frozen=True)
class Division:
    """One division of the work, which all drivers have in common."""

    id: str
    """Another one for each division."""
    parts: int
    begins: tuple[int, ...]
    """Indices of the shards at which a range to be divided begins; the first is 0."""
    counts: InputCounts
    config: Mapping[str, Any]
    """The configuration without what may differ between drivers."""
    fingerprints: Mapping[str, str]
    finished: bool = False
    """Whether what all parts made was put together."""

    def ranges(self, part: int) -> list[range]:
        """Indices of the shards of a part, rising."""
        ends = [*self.begins[1:], self.counts.shards]
        return [
            range(begin + (end - begin) * (part - 1) // self.parts, begin + (end - begin) * part // self.parts)
            for begin, end in zip(self.begins, ends, strict=True)
        ]

    def part_of(self, shard: int) -> int:
        """The part that a shard belongs to."""
        return next(part for part in range(1, self.parts + 1) if any(shard in those for those in self.ranges(part)))

    def write(self, run: RunFolder) -> None:
        run.storage.write_json(DIVISION, asdict(self))

    def check_part(self, part: Part, run: RunFolder) -> None:
        """
        Raises:
            ConfigError: the folder was divided into another number of parts.
        """
        if self.parts != part.count and not self.finished:
            raise ConfigError(
                f"--part {part}: the work of {run.url} is divided into {self.parts} parts; give K/{self.parts}, or "
                f"run without --part, which does all that is left; or, with no part at work, delete {run.url}/{PARTS}"
            )

    def check_same(self, run: RunFolder, config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
        """
        Raises:
            StaleOutputError: another driver has another configuration, or makes other groups; lists the differences.
        """
        changes = differences(dict(self.config), dict(config))
        if not changes and dict(self.fingerprints) != dict(fingerprints):
            names = sorted(self.fingerprints.keys() | fingerprints.keys())
            changed = [name for name in names if self.fingerprints.get(name) != fingerprints.get(name)]
            changes = [f"{name}: would be made otherwise (another model, package or version)" for name in changed]
        if changes:
            raise StaleOutputError(
                f"{run.url}: its parts were begun with another configuration:\n  "
                + "\n  ".join(changes)
                + "\nGive every part the same values, or choose another --out."
            )


def read_division(run: RunFolder) -> Division | None:
    """The division of a folder; None if there is none.

    Raises:
        ConfigError: its file is damaged.
    """
    value = run.storage.read_json(DIVISION, _REMEDY)
    if value is None:
        return None
    try:
        fields = {**value, "begins": tuple(value["begins"]), "counts": InputCounts(**value["counts"])}
        return Division(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(f"{run.url}/{DIVISION}", error, _REMEDY) from error


def summary_of_part(part: int) -> str:
    """Name of the file that says how a part ended."""
    return f"{PARTS}/{part:05d}.json"


def read_part(run: RunFolder, division: Division, part: int) -> dict[str, Any] | None:
    """What a part says of its end; None if it has not come to it."""
    summary = run.storage.read_json_if_whole(summary_of_part(part))
    return summary if isinstance(summary, dict) and summary.get("division") == division.id else None


@dataclass(frozen=True, slots=True)
class PartsView:
    """How far the parts of a run are.

    Attributes:
        done: summaries of the parts that have come to their end.
        running: parts at work.
        stopped: parts that are neither, and had begun.
        absent: parts that never came.
    """

    division: Division
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    running: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)

    @property
    def missing(self) -> list[int]:
        """Parts that have not come to their end."""
        return sorted([*self.running, *self.stopped, *self.absent])

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": self.division.parts,
            "done": len(self.done),
            "running": self.running,
            "stopped": self.stopped,
            "absent": self.absent,
            "finished": self.division.finished,
        }

    def missing_text(self) -> str:
        """The missing parts in words; empty if there are none."""
        named = ((self.running, "at work"), (self.stopped, "stopped"), (self.absent, "never came"))
        return "; ".join(f"{shown(parts)} ({what})" for parts, what in named if parts)


def view_parts(run: RunFolder, division: Division | None = None) -> PartsView | None:
    """How far the parts of a run are; None of a run that is not divided."""
    division = division or read_division(run)
    if division is None:
        return None
    numbers = range(1, division.parts + 1)
    done: dict[int, dict[str, Any]] = {}
    present = set(run.storage.names(PARTS))
    wanted = [number for number in numbers if summary_of_part(number).rpartition("/")[2] in present]
    for number, summary in zip(
        wanted, run.storage.map(lambda part: read_part(run, division, part), wanted), strict=True
    ):
        if summary is not None:
            done[number] = summary
    view = PartsView(division, done)
    if len(done) == division.parts:
        return view
    running, begun = set(running_parts(run.storage)), set(_begun(run))
    for number in numbers:
        if number not in done:
            kind = view.running if number in running else view.stopped if number in begun else view.absent
            kind.append(number)
    return view


def _begun(run: RunFolder) -> Iterable[int]:
    """Parts that have a folder of their own."""
    from pipeline.storage.open import open_storage

    entries = open_storage(f"{run.url}/{PARTS}").entries()
    return (int(name) for name, is_folder in entries if is_folder and name.isdigit())


def shown(parts: Iterable[int]) -> str:
    """Numbers of parts in words: `3, 5-9`."""
    spans: list[list[int]] = []
    for part in sorted(parts):
        if spans and spans[-1][1] == part - 1:
            spans[-1][1] = part
        else:
            spans.append([part, part])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
