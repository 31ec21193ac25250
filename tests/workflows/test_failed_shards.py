"""A shard on which a stage fails is left out of the store completely; the others can be read and trained on."""

import json
from pathlib import Path

import pytest

from imagen_core.store import Store
from pipeline.stage import Task
from stages.precompute.encode_text import EncodeStage
from stages.precompute.resize import ResizeStage
from tests.commands import call, precompute
from tests.runs import SMALL, store_bytes

NO_DELAY = "execution.retry_delay_s=0"


def poison(monkeypatch: pytest.MonkeyPatch, stage: type[EncodeStage] | type[ResizeStage], *shards: int) -> None:
    """The stage raises on these shards, as one on a broken driver or a bug would."""
    honest = stage.process

    def process(self: EncodeStage, task: Task) -> None:
        if task.shard.index in shards:
            raise RuntimeError(f"poisoned {task.shard.index}")
        honest(self, task)

    monkeypatch.setattr(stage, "process", process)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [EncodeStage, ResizeStage])
def test_the_store_of_a_run_with_a_failed_shard_has_the_rows_of_the_others(
    stage: type[EncodeStage], small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    poison(monkeypatch, stage, 1)
    result = precompute(out, *SMALL, NO_DELAY)
    assert result.code == 3
    assert f"1 of 3 shards failed; the others are finished. First: {stage_name(stage)} on shard 1: " in result.err
    traceback = (out / "quarantine" / "failed" / f"{stage_name(stage)}-00001.txt").read_text()
    assert traceback.endswith("RuntimeError: poisoned 1\n")

    store = Store.open(out / "store")
    assert store.encoders == ["t5"]
    assert store.manifest.failed_shards == (1,)
    assert [sample.key for sample in store] == [f"{i:09d}" for i in range(20) if i != 2 and not 8 <= i < 16]
    loader = store.loader(batch_size=4, images=[16], text="t5", seed=0)
    assert sum(len(batch["keys"]) for batch in loader) == 11
    inspected = json.loads(call("inspect", str(out), "--json").out)
    assert (inspected["failed_shards"], inspected["num_samples"]) == ([1], 11)

    verified = call("verify", str(out))
    assert verified.code == 1
    assert "20 input rows, but the shards have 12: 1 shards failed (00001); run the same" in verified.out
    assert "20 input rows: 11 samples, 1 dropped (http_404 1), 0 excluded, 8 unaccounted" in verified.out

    monkeypatch.undo()
    assert precompute(out, *SMALL, NO_DELAY).code == 0
    assert store_bytes(out) == store_bytes(small_run)
    assert call("verify", str(out)).code == 0


def stage_name(stage: type) -> str:
    return "encode-t5" if stage is EncodeStage else "resize"


def test_a_run_that_fails_everywhere_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, EncodeStage, 0, 1, 2)
    result = precompute(tmp_path / "run", *SMALL, NO_DELAY)
    assert (result.code, "3 of 3 shards failed" in result.err) == (1, True)
    early = precompute(tmp_path / "run", *SMALL, NO_DELAY, "execution.give_up_after_shards=2")
    assert early.code == 1
    assert "encode-t5 failed on each of its first 2 shards" in early.err


def test_a_failed_shard_of_a_group_added_later_leaves_the_rest_in_the_store(
    copy_of_small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, EncodeStage, 2)
    two = "encoders=[{name: t5, model: tiny-random-t5}, {name: b, model: tiny-random-t5, max_tokens: 6}]"
    assert precompute(copy_of_small_run, *SMALL, NO_DELAY, two).code == 3
    store = Store.open(copy_of_small_run / "store")
    assert store.encoders == ["b", "t5"]
    assert len(store) == 15, "without the shard of 4 rows"
