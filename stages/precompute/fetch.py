"""Fetches the originals of a shard from any source into a staged tar."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from imagen_core.store import REMOVED, RETRIED, Blocklist
from pipeline.stage import Group, GroupResult, Resources, Shard, Stage, Task, note_progress
from pipeline.storage.run_folder import RunFolder
from stages.captions import is_valid_text
from stages.precompute.originals import OriginalsWriter, load_tar_writer
from stages.sources.annotations import check_annotations, check_hashes
from stages.sources.base import Original, Source
from stages.stores import known_removals

ORIGINALS = "originals"
SAMPLES = "samples"
NUM_REMOVALS = "removals"
"""Entry of a record: how many removals from the store its rows were compared with."""

_FETCH_CPUS = 0.5  # mostly waits for the network or the disk


class FetchStage(Stage):
    """Source rows -> `originals` (intermediate): every row with its bytes, or with the reason of its drop.

    Captions are cleaned and annotations checked here, for all sources. An image that was removed from the store is not
    stored again: its row is the drop `removed`.
    """

    identity = "FetchStage"
    name = "fetch"
    resources = Resources(num_cpus=_FETCH_CPUS)

    def __init__(self, source: Source, kind: str):
        self.source = source
        self.groups = (Group(ORIGINALS, {"source": kind, **source.fingerprint()}, transient=True),)

    def setup(self, run: RunFolder) -> None:
        load_tar_writer()  # here, so that no shard waits for it
        self.source.prepare()

    def process(self, task: Task) -> None:
        wanted = _wanted_keys(task)
        removals = known_removals(task.run)
        blocklist = Blocklist(removals)
        counts = {"fetched": 0, "bytes": 0, "unusable": 0}
        scratch = task.run.storage.new_folder()
        try:
            with OriginalsWriter(task.output(ORIGINALS, ".tar")) as writer:

                def write(original: Original) -> None:
                    if original.row in task.retried_rows:
                        original = replace(original, data=None, reason=RETRIED, detail="in a later round")
                    if blocklist.blocks(original.key, original.url, original.data):
                        original = replace(original, captions=(), data=None, reason=REMOVED, detail="", annotations={})
                    original = _storable(original)
                    writer.write(original)
                    note_progress()
                    counts["fetched"] += original.data is not None
                    counts["unusable"] += original.reason is not None
                    counts["bytes"] += len(original.data or b"")

                fetch_originals(self.source, task.shard, wanted, scratch, write)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        task.done(
            ORIGINALS,
            GroupResult(
                rows=counts["fetched"],
                counters={"bytes_fetched": counts["bytes"], "found_unusable": counts["unusable"]},
                info={"partial": wanted is not None, NUM_REMOVALS: len(removals)},
            ),
        )


def fetch_originals(
    source: Source, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Callable[[Original], None]
) -> None:
    """Reads the rows of a shard, in any order, with cleaned captions.

    Duplicates, and rows that the driver could not read, are dropped without being fetched.

    Args:
        wanted: keys to read; None for all. Other rows are not emitted.
        scratch: an empty folder for temporary files.
    """
    rows = [row for row in source.rows_of(shard) if wanted is None or row.key in wanted]
    usable = [row for row in rows if not row.is_duplicate and row.drop is None]
    source.fetch(shard, usable, scratch, lambda original: emit(original.cleaned()))
    for row in rows:
        if row.drop is not None:
            emit(Original.dropped(row, *row.drop).cleaned())
        elif row.is_duplicate:
            emit(Original.dropped(row, "duplicate_key").cleaned())


def _storable(original: Original) -> Original:
    """As the store can hold it: a key, a hash or an annotation that is not valid is a drop; a URL is only escaped."""
    if original.reason is None and not is_valid_text(original.key):
        original = replace(original, data=None, reason="invalid_key", detail="not UTF-8")
    if original.url is not None and not is_valid_text(original.url):
        original = replace(original, url=original.url.encode("utf-8", "backslashreplace").decode())
    annotations, mismatch = check_hashes(original.annotations, original.data)
    if original.reason is None and mismatch is not None:
        original = replace(original, data=None, reason="hash_mismatch", detail=mismatch)
    annotations, reason, detail = check_annotations(annotations)
    if original.reason is None and reason is not None:
        return replace(original, data=None, reason=reason, detail=detail, annotations=annotations)
    return replace(original, annotations=annotations)


def _wanted_keys(task: Task) -> frozenset[str] | None:
    """None, which is all rows, at first; the keys of the shard's samples once these are fixed."""
    if not task.has(SAMPLES):
        return None
    from imagen_core.store import read_samples

    return frozenset(row.key for row in read_samples(task.input(SAMPLES)))
