"""What the table of samples holds of one shard, column by column."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagen_core.store import Store, choose_buckets
from imagen_core.store.files.arrow_column import arrow_column, as_numpy, numbers_column
from imagen_core.store.read.computed import array_numbers, longest_captions
from imagen_core.store.read.reader import OpenShard
from stages.browse.store.fields import Field, text_columns
from stages.browse.web import error_line

_READ = ("key", "captions", "caption_ids", "url", "sha256", "width", "height", "label")


class ShardReader:
    """Reads what the table holds of a shard's samples, without the excluded ones."""

    def __init__(self, store: Store, fields: Sequence[Field], problems: list[str]):
        self._store, self._problems = store, problems
        self._columns = {field.key: field.column for field in fields}
        self._further = dict(list(text_columns(store).items())[1:])
        self._firsts = np.concatenate([[0], np.cumsum(store.manifest.rows)])
        bucketed = [group for group in store.manifest.images.values() if group.shapes]
        self._shapes = bucketed[0].shapes if bucketed else ()

    def read(self, position: int) -> pa.Table | None:
        """None where `samples` cannot be read; what else cannot be read is null."""
        store, kept = self._store, list(self._store.columns)
        files = store.shard(position)
        found = self._try(lambda: files.columns([*_READ, *kept]))
        if found is None:
            return None
        rows = np.setdiff1d(np.arange(found.num_rows), list(store.manifest.excluded.get(position, ())))
        width, height = (as_numpy(found[name].combine_chunks()) for name in ("width", "height"))
        values: dict[str, Any] = {
            "id": numbers_column(self._firsts[position] + np.arange(found.num_rows)),
            "shard": numbers_column(np.full(found.num_rows, store.manifest.index[position])),
            "row": numbers_column(np.arange(found.num_rows)),
            "text": found["captions"],
            **{name: found[name] for name in ("key", "url", "sha256", "width", "height")},
            "label": pc.cast(found["label"], pa.string()),
            "aspect": numbers_column(width / np.maximum(height, 1)),
            **{self._columns[f"column.{name}"]: _plain(found[name]) for name in kept},
        }
        if self._shapes:
            names = np.array([f"{shape[1]} x {shape[0]}" for shape in self._shapes])
            values["bucket"] = arrow_column(names[choose_buckets(width, height, self._shapes)].tolist(), pa.string())
        values |= self._tokens(files, found["caption_ids"].combine_chunks())
        for name, column in self._further.items():
            values |= self._captions(files, name, column)
        values |= self._scores(files)
        return pa.table(values).take(numbers_column(rows))

    def _tokens(self, files: OpenShard, caption_ids: pa.ListArray, of: str | None = None) -> dict[str, pa.Array]:
        """Tokens of the longest caption of each sample, by column.

        Args:
            of: the further set of captions that the ids are of.
        """
        counts = {
            encoder: self._try(lambda e=encoder: (files.text[e] if of is None else files.set_texts[e, of]).num_tokens)
            for encoder in self._store.encoders
            if of is None or (encoder, of) in self._store.manifest.set_texts
        }
        ending = "" if of is None else f"/{of}"
        return {
            self._columns[f"tokens.{name}{ending}"]: numbers_column(*longest_captions(number, caption_ids))
            for name, number in counts.items()
            if number is not None
        }

    def _captions(self, files: OpenShard, name: str, column: str) -> dict[str, pa.Array]:
        """The captions of a further set and their tokens, by column; null of a sample that has none."""
        found = self._try(lambda: files.caption_columns(name))
        if found is None:
            return {}
        captions, ids = (found[each].combine_chunks() for each in ("captions", "caption_ids"))
        has_some = pc.call_function("greater", [captions.value_lengths(), pa.scalar(0)])
        texts = pc.call_function("if_else", [has_some, captions, pa.nulls(1, captions.type)[0]])
        return {column: texts, **self._tokens(files, ids, name)}

    def _scores(self, files: OpenShard) -> dict[str, pa.Array]:
        names = [key.partition(".")[2] for key in self._columns if key.startswith("array.")]
        found = {name: self._try(lambda name=name: array_numbers(files.arrays[name])) for name in names}
        return {self._columns[f"array.{name}"]: numbers_column(*score) for name, score in found.items() if score}

    def _try(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - shown on the page
            self._problems.append(error_line(error))
            return None


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A kept column in the type of its field; what is not finite is no value."""
    if pa.types.is_floating(column.type):
        is_finite, missing = pc.call_function("is_finite", [column]), pa.nulls(1, column.type)[0]
        return pc.call_function("if_else", [is_finite, column, missing])
    return pc.cast(column, pa.string()) if pa.types.is_boolean(column.type) else column
