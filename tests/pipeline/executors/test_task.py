"""What a task writes of its failures and drops."""

from pathlib import Path

import pytest

from pipeline.errors import ShardError
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
