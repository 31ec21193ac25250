"""Makes a set of captions by asking a model about the originals of a shard."""

import hashlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from imagen_core.store import SampleRow, blank_key, captions_group, number_captions, read_samples, write_captions
from pipeline.errors import ConfigError, MachineError, StaleOutputError
from pipeline.fingerprint import differences, digest
from pipeline.stage import Drop, Group, GroupResult, Stage, Task, note_progress, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.captioners.answers import AnswerLog, Kept, folder_of, kept_answers
from stages.captioners.base import (
    Answer,
    Captioner,
    CaptionerConfig,
    ModelCaptionerConfig,
    Question,
    fitted,
    question_seed,
)
from stages.captioners.budget import Used
from stages.captioners.checks import problem_of
from stages.captioners.prompt import Prompt
from stages.captioners.server_identity import server_changes
from stages.captions import clean_captions
from stages.images import ImageRejected, decode_rgb
from stages.precompute.fetch import ORIGINALS, SAMPLES
from stages.precompute.originals import OriginalsReader, StoredOriginal

_BYTES_PER_CAPTION_TOKEN = 5
TRIED = "tried"
"""Entry of a record: how often each row without a good caption was asked about."""
USED = ("requests", "tokens_in", "tokens_out")
"""Counters of what was paid for."""


class MakeCaptionsStage(Stage):
    """`originals` and `samples` -> `captions-NAME`: one caption by a model for each sample, or none. A worker keeps
    the model, or the connections to its servers, and asks about several shards at once.

    An answer is kept in the run folder as soon as it comes, so that after a kill it is not asked for again.
    """

    identity = "MakeCaptionsStage"
    inputs = (ORIGINALS, SAMPLES)
    tasks_per_worker = 3  # so that the last answers of a shard leave no room for requests unused

    def __init__(self, captioner: ModelCaptionerConfig, columns: Collection[str], max_pixels: int):
        """
        Args:
            columns: of the source that the store keeps.
        Raises:
            ConfigError: the prompt names a column that there is not.
        """
        captioner = captioner.pinned()
        self.captioner = captioner
        self.max_pixels = max_pixels
        try:
            self.prompt = Prompt(captioner.prompt, columns)
        except ValueError as error:
            raise ConfigError(f"captioners.{captioner.name}.prompt: {error}") from error
        self.group = captions_group(captioner.name)
        self.name = f"make-{self.group}"
        self.max_workers = captioner.worker_count()
        self.resources, self.modules = captioner.occupies(), captioner.modules()
        config = {"kind": "captions", "set": captioner.name, "format": "parquet", "made_by": captioner.made_by()}
        self.groups = (Group(self.group, config, inputs=(SAMPLES,)),)
        self._model: Captioner | None = None
        self._recorded: Mapping[str, Any] = {}

    def setup(self, run: RunFolder) -> None:
        """Loads the model or finds the server, and compares it with the one that the set was begun with.

        Raises:
            MachineError: this worker's files are others than the driver's.
            StaleOutputError: it is another one.
        """
        if changes := differences(self.groups[0].config["made_by"], self.captioner.made_by()):
            raise MachineError(
                f"captioners.{self.captioner.name}: this worker finds another model than the run started with: "
                f"{'; '.join(changes)}; put the same files on every node, or start a new run"
            )
        self._model = self.captioner.start(lambda: used_before(run, self.captioner.name))
        self._recorded = keep_identity(run, self.captioner, self.groups[0].config, self._model.identity)

    def process(self, task: Task) -> None:
        assert self._model is not None
        samples = read_samples(task.input(SAMPLES))
        record = task.record(SAMPLES)
        assert record is not None
        identity = log_identity(self.groups[0], self._recorded, record.file.sha256)
        log = AnswerLog(task.run, self.captioner.name, task.shard.name, identity)
        try:
            with OriginalsReader(task.input(ORIGINALS)) as originals:
                shard = _ShardOfQuestions(self, task, samples, originals, log.read())
                for question, answer in self._model.answers(shard.next_question):
                    log.add(question.row, question.attempt, answer)
                    shard.take(question, answer)
        finally:
            log.close()
        shard.write(self.group)

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return num_rows * self.captioner.max_tokens * _BYTES_PER_CAPTION_TOKEN


@dataclass(slots=True)
class _ShardOfQuestions:
    """What was asked about a shard and answered so far."""

    stage: MakeCaptionsStage
    task: Task
    samples: Sequence[SampleRow]
    originals: OriginalsReader
    kept: Kept
    entries: dict[str, StoredOriginal] = field(default_factory=dict)
    open: deque[tuple[int, int]] = field(default_factory=deque)
    """Row and attempt of what is to be asked."""
    good: dict[int, tuple[str, str, int]] = field(default_factory=dict)
    """Caption, finish_reason and attempt, by row."""
    bad: dict[int, tuple[str, str, int]] = field(default_factory=dict)
    """Reason, detail and number of attempts, by row."""
    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(USED, 0))
    erased: int = 0

    def __post_init__(self) -> None:
        self.entries = {e.key: e for e in self.originals.entries if e.reason != "duplicate_key"}
        for answer in self.kept.answers.values():
            self._count(answer)
        for row, sample in enumerate(self.samples):
            if sample.key == blank_key(self.task.shard.index, row):
                self.erased += 1
            elif row in self.kept.good:
                caption, finish_reason, attempt = self.kept.good[row]
                self.good[row] = (caption, finish_reason or "", attempt)
            elif row in self.kept.bad:
                self.bad[row] = self.kept.bad[row]
            else:
                self._ask(row, self.kept.first_attempt.get(row, 0))

    def _count(self, answer: Answer) -> None:
        if answer.problem is None:
            self.used["requests"] += 1
            self.used["tokens_in"] += answer.tokens_in
            self.used["tokens_out"] += answer.tokens_out

    def _ask(self, row: int, attempt: int) -> None:
        """Asks about a row, unless the answer is kept."""
        answer = self.kept.answers.get((row, attempt))
        if answer is None:
            self.open.append((row, attempt))
        else:
            self._judge(row, attempt, answer)

    def next_question(self) -> Question | None:
        while self.open:
            row, attempt = self.open.popleft()
            note_progress()
            sample = self.samples[row]
            try:
                image = self._image(sample)
            except ImageRejected as rejected:
                self.bad[row] = (str(rejected.reason), rejected.detail, attempt)
                continue
            if image is None:
                self.bad[row] = ("no_image", "the source has no image for this row now", attempt)
                continue
            seed = question_seed(self.stage.captioner.seed, sample.key, attempt)
            return Question(row, attempt, seed, self.stage.prompt.fill(sample), image)
        return None

    def _image(self, sample: SampleRow) -> Image.Image | None:
        """The image as the model sees it; None if it is not there, or another one than the sample was made from."""
        entry = self.entries.get(sample.key)
        data = self.originals.data(entry) if entry is not None and entry.size else b""
        if entry is None or hashlib.sha256(data).hexdigest() != sample.sha256:
            return None
        decoded = decode_rgb(data, max_pixels=self.stage.max_pixels, orientation=entry.orientation)
        return fitted(Image.fromarray(decoded.pixels), self.stage.captioner.image_px)

    def take(self, question: Question, answer: Answer) -> None:
        """Takes an answer."""
        self._count(answer)
        self._judge(question.row, question.attempt, answer)

    def _judge(self, row: int, attempt: int, answer: Answer) -> None:
        captioner = self.stage.captioner
        if answer.problem is not None:
            self.bad[row] = (*answer.problem, attempt + 1)
            return
        tries = 1 if captioner.is_repeatable else captioner.attempts
        problem = problem_of(answer.text, answer.finish_reason, captioner.checks)
        if problem is None:
            ((caption,), _) = clean_captions([answer.text])
            self.good[row] = (caption, answer.finish_reason or "", attempt)
        elif attempt + 1 < self.kept.first_attempt.get(row, 0) + tries:
            self._ask(row, attempt + 1)
        else:
            self.bad[row] = (*problem, attempt + 1)

    def write(self, group: str) -> None:
        """Writes the captions, with who has none and why."""
        captioner, samples, task = self.stage.captioner, self.samples, self.task
        rows = number_captions([self.good[row][:1] if row in self.good else () for row in range(len(samples))])
        for row, (_, finish_reason, attempt) in self.good.items():
            seed = question_seed(captioner.seed, samples[row].key, attempt)
            rows[row] = replace(rows[row], seeds=(seed,), finish_reasons=(finish_reason,))
        write_captions(task.output(group, ".parquet"), [sample.key for sample in samples], rows)
        drops = [Drop(row, samples[row].key, *self.bad[row][:2]) for row in sorted(self.bad)]
        counters: dict[str, float] = {
            "captions": len(self.good),
            "distinct_captions": len({i for row in rows for i in row.ids}),
            "samples_without": len(samples) - len(self.good) - self.erased,
            **{name: count + self.kept.used.get(name, 0) for name, count in self.used.items()},
        }
        listed = "excluded_rows" if captioner.on_bad == "drop" else "rows_without"
        tried = {str(row): attempts for row, (_, _, attempts) in sorted(self.bad.items())}
        info: dict[str, object] = {listed: rows_by_reason(drops), **({TRIED: tried} if tried else {})}
        task.done(group, GroupResult(len(samples), drops, counters, info))


def identity_file(captioner: str) -> str:
    """Where a run folder keeps who writes the captions of a set."""
    return f"{folder_of(captioner)}/model.json"


def keep_identity(
    run: RunFolder, captioner: CaptionerConfig, config: Mapping[str, Any], found: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Writes who makes the captions, or compares with who did.

    Returns:
        What is recorded.

    Raises:
        StaleOutputError: it is another model.
    """
    name, made_for = identity_file(captioner.name), digest(dict(config))
    remedy = "delete it, and the folder of the set in the store and in state, to make the set again"
    kept = run.storage.read_json(name, remedy)
    if kept is None or kept["config"] != made_for:
        text = {"config": made_for, "model": dict(found)}
        run.storage.write_json(name, text)
        return found
    if changes := server_changes(kept["model"], found):
        raise StaleOutputError(
            f"captioners.{captioner.name}: another model answers than the one that the set was begun with: "
            f"{'; '.join(changes)}; serve that one again, or give the captioner another name, which makes another set"
        )
    return kept["model"]


def log_identity(group: Group, model: Mapping[str, Any], samples_sha256: str) -> str:
    """What answers must have been made for to be of use."""
    return digest([dict(group.config), dict(model), samples_sha256])


def used_before(run: RunFolder, captioner: str) -> Used:
    """What the folder's runs have used so far, as far as it is recorded."""
    used, committed = Used(), set()
    for record in run.records(captions_group(captioner)):
        committed.add(record.shard)
        used.requests += int(record.counters.get("requests", 0))
        used.tokens_in += int(record.counters.get("tokens_in", 0))
        used.tokens_out += int(record.counters.get("tokens_out", 0))
    for line in kept_answers(run, captioner, committed):
        counted = line.get("used", line if line.get("problem", 0) is None else {})
        used.requests += int(counted.get("requests", 1 if "text" in counted else 0))
        used.tokens_in += int(counted.get("tokens_in", 0))
        used.tokens_out += int(counted.get("tokens_out", 0))
    return used
