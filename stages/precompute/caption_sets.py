"""Reads a further set of captions from the source's table, for samples that are there already."""

from collections.abc import Mapping

from imagen_core.store import blank_key, captions_group, number_captions, read_samples, write_captions
from pipeline.stage import Group, GroupResult, Resources, Shard, Stage, Task
from stages.captions import clean_captions
from stages.precompute.fetch import SAMPLES
from stages.sources.annotations import CaptionColumn
from stages.sources.base import Original, Source

_READ_CPUS = 0.5  # mostly waits for the disk
_BYTES_PER_ROW = 200


class CaptionColumnStage(Stage):
    """`samples`, and a column of the source's table -> `captions-NAME`. Nothing else of the source is read.

    A sample without a caption of the set stays. Another stage may make such a group too: it writes the same files, and
    says in `made_by` where its captions come from.
    """

    identity = "CaptionColumnStage"
    inputs = (SAMPLES,)
    resources = Resources(num_cpus=_READ_CPUS)

    def __init__(self, captions: CaptionColumn, source: Source):
        self.captions = captions
        self.source = source
        self.group = captions_group(captions.called)
        self.name = f"read-{self.group}"
        config = {"kind": "captions", "set": captions.called, "format": "parquet"}
        made_by = {"kind": "column", "column": captions.column}
        cells = captions.column if source.has_cells_apart else None
        self.groups = (Group(self.group, {**config, "made_by": made_by}, cells=cells),)

    def process(self, task: Task) -> None:
        samples = read_samples(task.input(SAMPLES))
        cells = self.source.caption_cells(task.shard, self.captions.column)
        found: list[tuple[str, ...]] = []
        unusable = erased = 0
        for row, sample in enumerate(samples):
            is_erased = sample.key == blank_key(task.shard.index, row)
            cell = [] if is_erased else cells[sample.input_row]
            erased += is_erased
            captions, reason = ((), "unsupported_type") if cell is None else clean_captions(cell)
            found.append(captions if reason is None else ())
            unusable += reason not in (None, "empty_caption")
        rows = number_captions(found)
        write_captions(task.output(self.group, ".parquet"), [sample.key for sample in samples], rows)
        counters = {
            "captions": sum(map(len, found)),
            "distinct_captions": len({i for row in rows for i in row.ids}),
            "samples_without": sum(not captions for captions in found) - erased,
            "unusable_cells": unusable,
        }
        task.done(self.group, GroupResult(len(samples), counters=counters))

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return num_rows * _BYTES_PER_ROW


def may_be_samples(source: Source, shard: Shard, column: str) -> list[bool]:
    """For each row of a shard, whether nothing in it says that it will be dropped, as captions that are empty do.

    Args:
        column: of the first set of captions.
    """
    rows = source.rows_of(shard)
    if "captions" in source.layout:
        captions = [Original.of(row).cleaned().captions for row in rows]
    else:
        captions = [clean_captions(cell or ())[0] for cell in source.caption_cells(shard, column)]
    pairs = zip(rows, captions, strict=True)
    return [bool(found) and not row.is_duplicate and row.drop is None for row, found in pairs]


def caption_sets_line(counters: Mapping[str, float]) -> str:
    """What is missing of a further set of captions, as text; "" if nothing is, or for another group."""
    without, unusable = counters.get("samples_without", 0), counters.get("unusable_cells", 0)
    if not without:
        return ""
    told = f", {unusable:,.0f} of them as the cell is of another type or no valid text" if unusable else ""
    have = "sample has" if without == 1 else "samples have"
    return f"{without:,.0f} {have} no caption of this set{told}"
