"""The progress of stages as lines of text: one per stage, aligned, and never wider than the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

_GAP = "  "
_WIDEST_BAR, _NARROWEST_BAR = 40, 6


@dataclass(frozen=True, slots=True)
class StageLine:
    """What is known of a stage."""

    name: str
    done: int
    """Finished shards."""
    total: int | None
    """An estimate of all shards; None if unknown."""
    rows_per_s: float | None
    drops: int
    eta_s: float | None


def stage_lines(stages: Sequence[StageLine], width: int) -> list[str]:
    """A line per stage of at most `width` characters: bar, shards, rate, drops and remaining time.

    Words and numbers stay whole. Columns that have no room are left out: first the bar, then the word `shards`, rate,
    drops, remaining time; the name and the shards always stay.
    """
    if not stages:
        return []
    drops = [_counted(stage.drops, "drop") for stage in stages]
    rates = ["" if stage.rows_per_s is None else f"{stage.rows_per_s:,.0f} rows/s" for stage in stages]
    etas = ["" if stage.eta_s is None else f"ETA {duration(stage.eta_s)}" for stage in stages]
    counts = [
        f"{stage.done:,}/{max(stage.done, stage.total):,}" if stage.total else f"{stage.done:,}" for stage in stages
    ]
    shards = [f"{count} shards" for count in counts]
    names = [stage.name for stage in stages]
    for columns in ([shards, rates, drops, etas], [counts, rates, drops, etas], [counts, drops, etas], [counts, etas]):
        lines = _aligned(names, columns)
        room = width - max(map(len, lines))
        if room >= 0:
            bar = min(_WIDEST_BAR, room - len(_GAP))
            if bar >= _NARROWEST_BAR and columns[0] is shards and any(stage.total for stage in stages):
                lines = _aligned(names, [[_bar(stage, bar) for stage in stages], *columns])
            return [line.rstrip() for line in lines]
    return [line.rstrip() for line in _aligned(names, [counts])]


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts as fit a line of `width` characters, whole, with two spaces between; at least one."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + len(_GAP) + len(part) > width:
            break
        line += _GAP + part
    return line


def duration(seconds: float) -> str:
    """`4:05` (minutes and seconds), `1:02:03`, or `3 d 4 h`."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86400:,} d {whole % 86400 // 3600} h"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _aligned(names: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, other columns to the right."""
    widths = [max(map(len, column)) for column in columns]
    name_width = max(map(len, names))
    used = [place for place, width in enumerate(widths) if width]
    return [
        _GAP.join([f"{name:<{name_width}}", *(f"{columns[place][row]:>{widths[place]}}" for place in used)])
        for row, name in enumerate(names)
    ]


def _bar(stage: StageLine, width: int) -> str:
    """A bar of ASCII characters, which every terminal and log has."""
    total = max(stage.done, stage.total or 0)
    full = width - 2 if total == stage.done and total else (width - 2) * stage.done // max(total, 1)
    return f"[{'#' * full}{'.' * (width - 2 - full)}]"
