"""Cron expressions: checked, and written as systemd's calendar events.

Only what cron, Kubernetes and Airflow read alike: five fields of numbers, names, ranges, lists and steps.
"""

import re
from dataclasses import dataclass

from pipeline.errors import ConfigError

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
)
_VALUE = "[0-9]+|[A-Za-z]+"
_SPAN = rf"(?:\*|(?P<first>{_VALUE})-(?P<last>{_VALUE}))(?:/(?P<step>[0-9]+))?"
_ITEM = re.compile(rf"{_SPAN}|(?P<one>{_VALUE})")


@dataclass(frozen=True, slots=True)
class Cron:
    """The sorted values of each field of an expression; None for `*`."""

    minutes: tuple[int, ...] | None
    hours: tuple[int, ...] | None
    days: tuple[int, ...] | None
    months: tuple[int, ...] | None
    weekdays: tuple[int, ...] | None
    """0 is Sunday."""

    def calendar(self, timezone: str) -> list[str]:
        """The same times as `OnCalendar=` values; two if days of month and of week are given, as cron takes either."""
        time = f"{_listed(self.hours)}:{_listed(self.minutes)}:00 {timezone}"
        month = _listed(self.months)
        events = []
        if self.weekdays is not None:
            names = ",".join(_DAYS[day].capitalize() for day in self.weekdays)
            events.append(f"{names} *-{month}-* {time}")
        if self.days is not None or self.weekdays is None:
            events.append(f"*-{month}-{_listed(self.days)} {time}")
        return events


def parse_cron(text: str) -> Cron:
    """Reads five fields: minute, hour, day of month, month, day of week.

    Raises:
        ConfigError: not a cron expression, or one that schedulers read in different ways.
    """
    parts = text.split()
    if len(parts) != len(_FIELDS):
        raise ConfigError(
            f"--at {text!r}: needs five fields (minute, hour, day of month, month, day of week), got {len(parts)}; "
            "for example '0 3 * * *', daily at 3:00"
        )
    cron = Cron(*(_values(text, part, *field) for part, field in zip(parts, _FIELDS, strict=True)))
    if cron.days is not None and cron.weekdays is not None and "*" in (parts[2][0], parts[4][0]):
        raise ConfigError(
            f"--at {text!r}: day of month is {parts[2]!r} and weekday {parts[4]!r}; cron takes days that both name, "
            "Kubernetes days that either names. Write the steps out, as 1-31/2, or leave one as *"
        )
    return cron


def _values(text: str, part: str, field: str, low: int, high: int, names: tuple[str, ...]) -> tuple[int, ...] | None:
    if part == "*":
        return None
    values: set[int] = set()
    for item in part.split(","):
        found = _ITEM.fullmatch(item)
        ends = (found["first"] or found["one"], found["last"] or found["one"]) if found else ("", "")
        start, end = (low, high) if ends == (None, None) else (_number(end, low, names) for end in ends)
        step = int(found["step"] or 1) if found else 0
        if not step or not low <= start <= end <= high:
            choices = f" or {names[0]}-{names[-1]}" if names else ""
            raise ConfigError(
                f"--at {text!r}: {field} is {part!r}; it takes {low}-{high}{choices}, as *, N, N-N, */STEP, N-N/STEP, "
                "or several with commas"
            )
        values.update(range(start, end + 1, step))
    return tuple(sorted(values))


def _number(text: str, low: int, names: tuple[str, ...]) -> int:
    """The value of a number or name; -1 if it is neither."""
    if text.isdigit():
        return int(text)
    return low + names.index(text.upper()) if text.upper() in names else -1


def _listed(values: tuple[int, ...] | None) -> str:
    return "*" if values is None else ",".join(f"{value:02d}" for value in values)
