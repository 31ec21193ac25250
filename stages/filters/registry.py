"""Every filter, picked by `kind`."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from imagen_core.extensions import Kinds
from stages.filters.base import Filter
from stages.filters.keep_rate import KeepRate
from stages.filters.size import MaxPixels, MaxSide, MinBytes, TooSmall

AnyFilter = Annotated[
    KeepRate  # one line for each
    | MaxPixels
    | MaxSide
    | MinBytes
    | TooSmall,
    Kinds("pipeline.filters", Filter),
]
"""A filter; other packages add kinds by entry points in `pipeline.filters`."""

ALWAYS: tuple[MaxPixels, TooSmall] = (MaxPixels(), TooSmall())
"""Filters that are applied first, with these settings unless a list names them."""


def _with_defaults(filters: Sequence[AnyFilter]) -> tuple[AnyFilter, ...]:
    """The filters of `ALWAYS`, with the settings that the list gives them, then the other filters of the list."""
    first: list[AnyFilter] = []
    for default in ALWAYS:
        named = [filter for filter in filters if filter.kind == default.kind]
        if len(named) > 1:
            raise ValueError(f"kind {default.kind} is named {len(named)} times; give it once")
        first += named or [default]
    kinds = {default.kind for default in ALWAYS}
    return (*first, *(filter for filter in filters if filter.kind not in kinds))


AnyFilters = Annotated[tuple[AnyFilter, ...], AfterValidator(_with_defaults)]
"""A list of filters; those of `ALWAYS` come first in it, named or not."""
