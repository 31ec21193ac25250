"""`source.where` of sources whose rows are read one by one."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from stages.sources.tabular.where import RowFilter

_AT_ONCE = 1024
_Row = TypeVar("_Row")


def row_filter(where: str | None) -> "RowFilter | None":
    """The filter of `source.where`; it is loaded only if there is one."""
    if where is None:
        return None
    from stages.sources.tabular.where import RowFilter

    return RowFilter(where)


def marked(
    rows: Iterable[_Row], record_of: Callable[[_Row], dict[str, Any]], row_filter: "RowFilter | None"
) -> Iterator[tuple[_Row, bool]]:
    """Rows in their order, each with whether it is kept; some are read ahead.

    Args:
        record_of: the columns of a row.
    """
    if row_filter is None:
        yield from ((row, True) for row in rows)
        return
    rows = iter(rows)
    while some := list(islice(rows, _AT_ONCE)):
        kept = set(row_filter.places([record_of(row) for row in some]).tolist())
        yield from ((row, place in kept) for place, row in enumerate(some))
