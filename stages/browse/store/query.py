"""A choice of samples: how it is read from an address, and what it is in SQL."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from stages.browse.store.fields import Field

_MOST_CHARACTERS = 1000


class QueryError(ValueError):
    """An address with a value that means nothing."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which samples, and in which order.

    Attributes:
        search: text that one of the captions has, whatever its case; "" for all samples.
        caption_set: the set of captions that is searched and shown; "": all are searched, and the first that fits is
            shown.
        ranges: by key of a field, the least and the greatest value; None for no bound.
        choices: by key of a field, its value.
        sort: key of the field to sort by; "" for the order of the store.
    """

    search: str
    ranges: Mapping[str, tuple[float | None, float | None]]
    choices: Mapping[str, str]
    sort: str
    descending: bool
    caption_set: str = ""

    @classmethod
    def parse(cls, given: Mapping[str, str], fields: Sequence[Field], caption_sets: Collection[str] = ()) -> "Query":
        """A query from the parameters of an address; those of no field are left alone.

        Raises:
            QueryError: a bound is no number, samples cannot be sorted by this, or the store has no such captions.
        """
        numbers = [field for field in fields if field.kind != "choice"]
        ranges = {
            field.key: (_bound(given, f"{field.key}_min"), _bound(given, f"{field.key}_max")) for field in numbers
        }
        choices = {f.key: given[f.key] for f in fields if f.kind == "choice" and given.get(f.key)}
        sort = given.get("sort", "")
        if sort and sort not in {field.key for field in fields}:
            raise QueryError(f"sort={sort[:80]}: samples have no such field")
        of = given.get("captions", "")
        if of and of not in caption_sets:
            raise QueryError(f"captions={of[:80]}: the store has the captions {', '.join(caption_sets)}")
        return cls(
            given.get("q", "")[:_MOST_CHARACTERS],
            {key: bounds for key, bounds in ranges.items() if bounds != (None, None)},
            choices,
            sort,
            given.get("order") == "descending",
            of,
        )

    def with_range(self, key: str, low: float | None, high: float | None) -> "Query":
        """The same with another range of one field."""
        return replace(self, ranges={**self.ranges, key: (low, high)})

    def with_choice(self, key: str, value: str) -> "Query":
        """The same with another value of one field."""
        return replace(self, choices={**self.choices, key: value})

    def without(self, key: str) -> "Query":
        """The same without the condition on one field."""
        return replace(
            self,
            ranges={k: v for k, v in self.ranges.items() if k != key},
            choices={k: v for k, v in self.choices.items() if k != key},
        )

    def address(self, **more: object) -> str:
        """`?...` for a link; "" for all samples."""
        values: dict[str, object] = {"q": self.search} if self.search else {}
        if self.caption_set:
            values["captions"] = self.caption_set
        for key, bounds in self.ranges.items():
            ends = zip(("min", "max"), bounds, strict=True)
            values |= {f"{key}_{end}": _shortest(bound) for end, bound in ends if bound is not None}
        values |= self.choices
        if self.sort:
            values["sort"] = self.sort
        if self.descending:
            values["order"] = "descending"
        values |= more
        return f"?{urlencode(values)}" if values else ""

    def where(self, fields: Sequence[Field]) -> tuple[str, list[Any]]:
        """The condition in SQL, and the values of its parameters; `found` has the samples that the search finds."""
        columns = {field.key: field.column for field in fields}
        parts, values = ["id IN (SELECT id FROM found)" if self.search else "true"], list[Any]()
        for key, (low, high) in self.ranges.items():
            for bound, comparison in ((low, ">="), (high, "<=")):
                if bound is not None:
                    parts.append(f"{columns[key]} {comparison} ?")
                    values.append(bound)
        for key, value in self.choices.items():
            parts.append(f"{columns[key]} = ?")
            values.append(value)
        return " AND ".join(parts), values

    def order(self, fields: Sequence[Field]) -> str:
        """`ORDER BY ...`; a sample without a value is last."""
        columns = {field.key: field.column for field in fields}
        direction = "DESC" if self.descending else "ASC"
        first = f"{columns[self.sort]} {direction} NULLS LAST, id" if self.sort else f"id {direction}"
        return f"ORDER BY {first}"


def _shortest(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _bound(given: Mapping[str, str], name: str) -> float | None:
    text = given.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise QueryError(f"{name}={text[:80]}: give a number")
    return value
