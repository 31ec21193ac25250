"""What a task writes of its failures and drops."""

from pathlib import Path

import pytest

from imagen_core.far import StorageError
from pipeline.errors import EXIT_INCOMPLETE, EXIT_PREEMPTED, PipelineError, ShardError
from pipeline.options import RunOptions
from pipeline.stage import Drop, GroupResult, Task
from tests.pipeline import toy
from tests.pipeline.toy import Toy, ToyConfig

SIGNED = "https://host/a.png?X-Amz-Signature=hidden-word"
WITH_PASSWORD = "s3://KEY:hidden/word@bucket/a.png"


def test_no_credential_of_a_failure_or_a_drop_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(stage: toy.Square, task: Task) -> None:
        if task.shard.index == 1:
            raise OSError(f"{WITH_PASSWORD}: denied, as {SIGNED} is")
        task.output("squares", ".txt").write_text("")
        task.done("squares", GroupResult(0, [Drop(row, "k", "lost", f"{SIGNED}: lost") for row in range(4)]))

    monkeypatch.setattr(toy.Square, "process", process)
    config = ToyConfig.model_validate({"toy": {"num_shards": 2}, "execution": {"retry_delay_s": 0}})
    with pytest.raises(ShardError) as caught:
        Toy(config).run(tmp_path / "r", RunOptions("inline", quiet=True))
    assert "OSError: s3://...@bucket/a.png: denied, as https://host/a.png?X-Amz-Signature=... is" in str(caught.value)
    files = {path: path.read_text() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    assert [path for path, text in files.items() if "hidden" in text] == []
    assert sum("X-Amz-Signature=..." in text for text in files.values()) >= 3, "quarantine, events, traceback"


@pytest.mark.parametrize(("passes", "exit_code", "tries"), [(True, EXIT_PREEMPTED, 1), (False, EXIT_INCOMPLETE, 2)])
def test_a_source_that_is_down_ends_the_run_and_one_that_refuses_a_file_is_a_try_of_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: bool, exit_code: int, tries: int
) -> None:
    met: list[int] = []

    def process(stage: toy.Square, task: Task) -> None:
        if task.shard.index == 1:
            met.append(task.shard.index)
            raise StorageError("https://h/1.tar: cannot be read", passes=passes)
        task.output("squares", ".txt").write_text("")
        task.done("squares", GroupResult(0, [Drop(row, "k", "lost", "") for row in range(4)]))

    monkeypatch.setattr(toy.Square, "process", process)
    settings = {"toy": {"num_shards": 2}, "execution": {"retry_delay_s": 0, "max_attempts": 2}}
    with pytest.raises(PipelineError, match=r"https://h/1\.tar: cannot be read") as caught:
        Toy(ToyConfig.model_validate(settings)).run(tmp_path / "r", RunOptions("inline", quiet=True))
    assert (caught.value.exit_code, len(met)) == (exit_code, tries)
