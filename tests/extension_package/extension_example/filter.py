"""A filter by the number of words."""

from typing import Literal

from stages.filters.base import Filter, FilterRow, Rejection


class MaxWords(Filter):
    """Drops rows with a caption of more than `max` words."""

    kind: Literal["max_words"] = "max_words"
    max: int
    """Most words of a caption."""

    def reject(self, row: FilterRow) -> Rejection | None:
        longest = max(len(caption.split()) for caption in row.captions)
        return None if longest <= self.max else Rejection("too_many_words", f"{longest} words")
