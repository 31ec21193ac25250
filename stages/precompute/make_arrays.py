"""Runs the stages that add arrays to the store, most of other packages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from imagen_core.store import (
    ArrayGroup,
    CaptionsFile,
    CaptionsGroup,
    EmbeddingGroup,
    ImageEmbedGroup,
    ImagesGroup,
    Sample,
    SampleRow,
    SetTextGroup,
    StoreFormat,
    TextGroup,
    array_group,
    array_shard_bytes,
    blank_key,
    captions_group,
    file_suffix,
    open_array_writer,
    open_arrays,
    open_embeddings,
    open_images,
    parse_group,
    read_samples,
    restore,
)
from imagen_core.store import Group as StoreGroup
from pipeline.errors import ConfigError
from pipeline.stage import Drop, Group, GroupResult, Stage, Task, note_progress, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.arrays.base import ArrayStageConfig, MakeArrays, StageConfig
from stages.filters.base import Rejection
from stages.precompute.fetch import SAMPLES


class ArrayError(ValueError):
    """A stage made something else than it declared; the shard fails."""


class ArrayStage(Stage):
    """`samples` and what the stage reads -> `array-NAME` for each of its arrays. It sees samples only, no files."""

    def __init__(
        self, config: ArrayStageConfig, store_format: StoreFormat, readable: Mapping[str, StoreGroup], field: str
    ):
        """
        Args:
            readable: the groups of earlier stages.
            field: of the configuration, for messages.
        Raises:
            ConfigError: no array, an array without a legal name, or a group that is not made before, or not as the
                stage needs it.
        """
        self.config = config
        self.store_format: StoreFormat = store_format
        try:
            self.specs = {array_group(name): (name, spec) for name, spec in config.arrays().items()}
        except ValueError as error:
            raise ConfigError(f"{field}: kind {config.kind}: {error}") from error
        if not self.specs:
            raise ConfigError(f"{field}: kind {config.kind} declares no array; repair the package")
        if missing := [name for name in config.reads() if name not in readable]:
            raise ConfigError(
                f"{field}: kind {config.kind} reads {missing[0]}, which no earlier stage makes; it can read "
                f"{', '.join(readable)}"
            )
        self.read_groups = [readable[name] for name in dict.fromkeys(_with_captions(config.reads(), readable))]
        try:
            config.check({group.name: group for group in self.read_groups})
        except ValueError as error:
            raise ConfigError(f"{field}: kind {config.kind}: {error}") from error
        self.fingerprint = config.fingerprint()
        self.name = f"make-{'+'.join(config.arrays())}"
        self.inputs = (SAMPLES, *(group.name for group in self.read_groups))
        self.resources, self.max_workers = config.resources(), config.workers()
        self.groups = tuple(Group(group, self._description(group)) for group in self.specs)
        self._make: MakeArrays | None = None

    def _description(self, group: str) -> dict[str, object]:
        name, spec = self.specs[group]
        return {
            "kind": "array",
            "array": name,
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "format": self.store_format,
            "fingerprint": self.fingerprint,
        }

    def setup(self, run: RunFolder) -> None:
        self._make = self.config.build()

    def process(self, task: Task) -> None:
        assert self._make is not None
        samples = read_samples(task.input(SAMPLES))
        erased = {row for row, s in enumerate(samples) if s.key == blank_key(task.shard.index, row)}
        left = [row for row in range(len(samples)) if row not in erased]
        made = self._aligned(task, samples, left, iter(self._make(self._samples(task, samples, left))))
        drops: list[Drop] = []
        wanted = {group: self.specs[group] for group in self.specs if group in task.wanted}
        with ExitStack() as files:
            writers = {
                group: files.enter_context(
                    open_array_writer(
                        task.output(group, file_suffix(self.store_format)), spec, self.store_format, self.fingerprint
                    )
                )
                for group, (_, spec) in wanted.items()
            }
            for row, sample in enumerate(samples):
                arrays = None if row in erased else next(made)
                if isinstance(arrays, Rejection):
                    drops.append(Drop(row, sample.key, arrays.reason, arrays.detail))
                    arrays = None
                for group, (name, spec) in wanted.items():
                    if arrays is None:
                        writers[group].append_stored(spec.blank(), sample.key)
                        continue
                    try:
                        writers[group].append(np.asarray(arrays[name]), sample.key)
                    except ValueError as error:
                        raise ArrayError(_where(task, group, row, sample, f"{error}; repair {self._owner}")) from error
                note_progress()
            next(made, None)
        for group in wanted:
            counters = {"arrays_made": len(left) - len(drops)}
            info = {"excluded_rows": rows_by_reason(drops)}
            task.done(group, GroupResult(len(samples), list(drops), counters, info))

    @property
    def _owner(self) -> str:
        """The stage and its package, for messages."""
        return f"kind {self.config.kind} of {type(self.config).__module__.partition('.')[0]}"

    def _aligned(
        self,
        task: Task,
        samples: Sequence[SampleRow],
        left: Sequence[int],
        made: Iterator[Mapping[str, np.ndarray] | Rejection],
    ) -> Iterator[Mapping[str, np.ndarray] | Rejection]:
        """What was made for each of the rows that are left, which must be one result with all arrays for each."""
        group, names = next(iter(self.specs)), {name for name, _ in self.specs.values()}
        for row in left:
            arrays = next(made, None)
            if arrays is None:
                says = f"nothing was made of it and the rows behind it; {self._owner} must yield once for each sample"
                raise ArrayError(_where(task, group, row, samples[row], says))
            if not isinstance(arrays, Rejection) and arrays.keys() != names:
                says = f"arrays {sorted(arrays)} were made, not {sorted(names)}; repair {self._owner}"
                raise ArrayError(_where(task, group, row, samples[row], says))
            yield arrays
        if next(made, None) is not None:
            raise ArrayError(
                f"{group}/{task.shard.name}: more was made than its {len(left)} samples; {self._owner} must yield "
                "once for each sample"
            )

    def _samples(self, task: Task, rows: Sequence[SampleRow], left: Sequence[int]) -> Iterator[Sample]:
        """The samples of the rows that are left, with what the stage reads."""
        readers = [(group, _reader(task, group)) for group in self.read_groups]
        kinds = (ImagesGroup, TextGroup, ImageEmbedGroup, ArrayGroup, CaptionsGroup, SetTextGroup)
        for number in left:
            row = rows[number]
            parts: dict[type, dict[Any, Any]] = {kind: {} for kind in kinds}
            for group, read in readers:
                name, value = read(number, row)
                part = parts[type(group)]
                if isinstance(group, SetTextGroup):
                    part.setdefault(group.caption_set, {})[name] = value
                else:
                    part[name] = value
            images, text, embeds, arrays, caption_sets, set_texts = parts.values()
            about = (row.key, list(row.captions), row.url, row.sha256, row.width, row.height)
            annotations = (row.transcription, row.safebox, row.label)
            columns = dict(row.columns)
            yield Sample(*about, images, text, embeds, *annotations, arrays, columns, caption_sets, set_texts)

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return array_shard_bytes(self.specs[group][1], num_rows)


def _where(task: Task, group: str, row: int, sample: SampleRow, says: str) -> str:
    return f"{group}/{task.shard.name}: row {row} ({sample.key!r}): {says}"


def _reader(task: Task, group: StoreGroup) -> Callable[[int, SampleRow], tuple[int | str, object]]:
    """Reads what one group has of a row: its name in the fields of `Sample`, and the value."""
    path = str(task.input(group.name))
    if isinstance(group, ImagesGroup):
        images = open_images(path, path, group)
        return lambda number, _: (group.size_px, np.array(images.pixels(number)))
    if isinstance(group, ArrayGroup):
        arrays = open_arrays(path, path, group)
        return lambda number, _: (group.array, arrays.value(number))
    if isinstance(group, CaptionsGroup):
        captions = CaptionsFile(path, path)
        return lambda number, _: (group.caption_set, captions.captions(number))
    assert isinstance(group, EmbeddingGroup)
    file = open_embeddings(path, path, group)
    if isinstance(group, TextGroup):
        return lambda _, row: (group.encoder, [restore(file.stored(i), group.dtype) for i in row.caption_ids])
    if isinstance(group, SetTextGroup):
        of = str(task.input(captions_group(group.caption_set)))
        ids = CaptionsFile(of, of)
        return lambda number, _: (
            group.encoder,
            [restore(file.stored(i), group.dtype) for i in ids.caption_ids(number)],
        )
    return lambda number, _: (group.encoder, restore(file.stored(number), group.dtype)[0])


def _with_captions(names: Sequence[str], readable: Mapping[str, StoreGroup]) -> Iterator[str]:
    """The groups, each of embeddings of a further set of captions behind that set."""
    for name in names:
        group = readable[name]
        if isinstance(group, SetTextGroup):
            yield captions_group(group.caption_set)
        yield name


def array_stages(
    configs: Sequence[StageConfig], store_format: StoreFormat, earlier: Sequence[Stage], caption_sets: Sequence[str]
) -> list[ArrayStage]:
    """The stages that add arrays, each of which may read what earlier ones make.

    Args:
        caption_sets: that the store will have, that of `samples` first.
    Raises:
        ConfigError: like `ArrayStage`, a set that there is not, or two of them make one array.
    """
    result: list[ArrayStage] = []
    for number, entry in enumerate(configs):
        try:
            expanded = entry.stages(caption_sets)
        except ValueError as error:
            raise ConfigError(f"stages.{number}.{error}") from error
        for config in expanded:
            made = [group for stage in [*earlier, *result] for group in stage.groups if not group.transient]
            readable = {
                group.name: parse_group(group.name, dict(group.config)) for group in made if group.name != SAMPLES
            }
            stage = ArrayStage(config, store_format, readable, f"stages.{number}")
            if twice := [group for group in stage.specs if group in readable]:
                raise ConfigError(
                    f"stages.{number}: kind {config.kind} makes {twice[0]}, as an earlier stage does; name it "
                    "otherwise"
                )
            result.append(stage)
    return result
