"""The state of a run: each part is made once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import retries, state
from pipeline.options import RunOptions
from pipeline.plan import Plan
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from tests.pipeline.toy import Toy, ToyConfig, ToyOptions


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a ledger was made, and the retried rows were read."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(state, "Ledger")
    count(retries, "retried_rows")
    return counted


def test_a_run_makes_one_ledger_and_reads_the_retried_rows_once(tmp_path: Path, calls: Counter[str]) -> None:
    toy = Toy(ToyConfig(toy=ToyOptions()))
    toy.run(str(tmp_path), RunOptions("inline", quiet=True))
    assert calls == {"Ledger": 1, "retried_rows": 1}


def test_a_new_retry_round_is_read_once_more(tmp_path: Path, calls: Counter[str]) -> None:
    toy = Toy(ToyConfig(toy=ToyOptions()))
    toy.run(str(tmp_path), RunOptions("inline", quiet=True))
    calls.clear()
    toy.run(str(tmp_path), RunOptions("inline", quiet=True, retry_dropped=("ends_in_seven",)))
    assert calls == {"Ledger": 1, "retried_rows": 2}
    assert RunFolder(tmp_path).storage.size("retries/00001-4.jsonl") is not None


def test_the_shards_of_retry_rounds_follow_those_of_the_source(tmp_path: Path) -> None:
    line = '{"shard": 0, "row": 1, "reason": "ends_in_seven", "source": 7}\n'
    (tmp_path / "retries").mkdir()
    (tmp_path / "retries/00001-4.jsonl").write_text(line)
    source = Shard(0, [1, 7], 2)
    opened = state.RunState.open(str(tmp_path), lambda _: Plan((), lambda: iter([source]), lambda *_: {}))
    assert list(opened.plan.shards()) == [source, Shard(10_000_000, [7], 1)]
    assert opened.retries.rows == {0: {1}}
