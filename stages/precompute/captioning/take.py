"""Takes a set of captions from a table, by the samples' keys."""

from imagen_core.store import blank_key, captions_group, number_captions, read_samples, write_captions
from pipeline.errors import MachineError
from pipeline.fingerprint import differences
from pipeline.resources import Resources
from pipeline.stage import Drop, Group, GroupResult, Stage, Task, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.captioners.table import CaptionTable, TableCaptionerConfig
from stages.precompute.captioning.make import keep_identity
from stages.precompute.fetch import SAMPLES

_READ_CPUS = 0.5  # mostly waits for the disk
_BYTES_PER_ROW = 400
_NO_CAPTION = ("missing_key", "empty_caption")


class TakeCaptionsStage(Stage):
    """`samples`, and a table -> `captions-NAME`. No image is read. One worker keeps the table, ordered by key."""

    identity = "TakeCaptionsStage"
    inputs = (SAMPLES,)
    resources = Resources(num_cpus=_READ_CPUS)
    max_workers = 1

    def __init__(self, captioner: TableCaptionerConfig):
        """
        Raises:
            ConfigError: the table cannot be read, or lacks a column.
        """
        captioner.check()
        self.captioner = captioner.pinned()
        self.group = captions_group(captioner.name)
        self.name = f"take-{self.group}"
        config = {"kind": "captions", "set": captioner.name, "format": "parquet", "made_by": captioner.made_by()}
        self.groups = (Group(self.group, config),)
        self._table: CaptionTable | None = None

    def setup(self, run: RunFolder) -> None:
        """Reads the table.

        Raises:
            ConfigError: a line cannot be read, or a key is missing or there twice.
            MachineError: this worker finds another table than the driver.
        """
        if changes := differences(self.groups[0].config["made_by"], self.captioner.made_by()):
            raise MachineError(
                f"captioners.{self.captioner.name}: this worker finds another table than the run started with: "
                f"{'; '.join(changes)}; put the same file on every node"
            )
        self._table = CaptionTable(self.captioner)
        keep_identity(run, self.captioner, self.groups[0].config, {"rows": self._table.num_rows})

    def process(self, task: Task) -> None:
        assert self._table is not None
        samples = read_samples(task.input(SAMPLES))
        keys = [sample.key for sample in samples]
        erased = {row for row, key in enumerate(keys) if key == blank_key(task.shard.index, row)}
        found = self._table.captions(keys)
        bad = {row: problem for row, (_, problem) in enumerate(found) if problem is not None and row not in erased}
        captions = [() if row in erased else texts for row, (texts, _) in enumerate(found)]
        rows = number_captions(captions)
        write_captions(task.output(self.group, ".parquet"), keys, rows)
        drops = [Drop(row, keys[row], *problem) for row, problem in bad.items()]
        counters = {
            "captions": sum(map(len, captions)),
            "distinct_captions": len({i for row in rows for i in row.ids}),
            "samples_without": len(bad),
            "unusable_cells": sum(reason not in _NO_CAPTION for reason, _ in bad.values()),
        }
        listed = "excluded_rows" if self.captioner.on_bad == "drop" else "rows_without"
        task.done(self.group, GroupResult(len(samples), drops, counters, {listed: rows_by_reason(drops)}))

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return num_rows * _BYTES_PER_ROW
