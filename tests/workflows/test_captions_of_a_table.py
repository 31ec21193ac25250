"""`captioners` of `kind: table`: captions from elsewhere become a set, by the samples' keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from imagen_core.store import Store, read_captions, verify_store
from pipeline.errors import MachineError, PipelineError, StaleOutputError
from pipeline.storage.run_folder import RunFolder
from stages.precompute.captioning.take import TakeCaptionsStage
from stages.precompute.fetch import FetchStage
from tests.commands import call
from tests.runs import precompute, precompute_interrupted, store_bytes
from workflows.precompute import Precompute, PrecomputeConfig

SMALL = ("source.num_samples=12", "shard_size=5", "images.sizes_px=[8]")
NO_ENCODER = (*SMALL, "encoders=[]")
KEYS = 11
"""Samples: one link of the synthetic source is dead."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The keys of the samples."""
    out = tmp_path_factory.mktemp("keys") / "run"
    precompute(out, *NO_ENCODER)
    return [sample.key for sample in Store.open(out / "store")]


def write(path: Path, rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"key": key, "caption": cell}) + "\n" for key, cell in rows.items()))
    return path


def captioner(path: Path, **settings: Any) -> str:
    config = [{"name": "florence", "kind": "table", "path": str(path), **settings}]
    return f"captioners={yaml.safe_dump(config, default_flow_style=True, width=10**6).strip()}"


def tally(summary: dict[str, Any]) -> dict[str, Any]:
    return summary["tally"]["groups"]["captions-florence"]


def test_a_table_becomes_a_set_and_what_it_lacks_is_counted_by_reason(keys: list[str], tmp_path: Path) -> None:
    rows: dict[str, Any] = {key: f"caption of {key}" for key in keys[3:]}
    rows |= {keys[0]: None, keys[1]: 7, keys[4]: ["one", "two"], "of no sample": "unused"}
    summary = precompute(tmp_path / "run", *SMALL, captioner(write(tmp_path / "t.jsonl", rows), weight=2))
    store = Store.open(tmp_path / "run" / "store")
    found = {sample.key: sample.caption_sets["florence"] for sample in store}
    assert found == {
        **{key: [] for key in keys[:3]},
        **{key: [f"caption of {key}"] for key in keys[3:]},
        keys[4]: ["one", "two"],
    }
    assert tally(summary)["drops"] == {"empty_caption": 1, "missing_key": 1, "unsupported_type": 1}
    assert tally(summary)["counters"] == {
        "captions": KEYS - 3 + 1,
        "distinct_captions": KEYS - 3 + 1,
        "samples_without": 3,
        "unusable_cells": 1,
    }
    assert store.caption_sets == {"original": 1.0, "florence": 2.0}
    assert [len(sample.set_texts["florence"]["t5"]) for sample in store] == list(map(len, found.values()))
    made_by = store.manifest.captions["florence"].made_by
    assert (made_by["kind"], len(made_by["sha256"]), made_by["found"]) == ("table", 64, {"rows": KEYS})
    assert str(tmp_path) not in str(made_by)
    files = sorted((tmp_path / "run/store/captions-florence").iterdir())
    assert [row.seeds for path in files for row in read_captions(path)] == [()] * KEYS
    drops = [json.loads(line) for line in _quarantine(tmp_path / "run")]
    assert {(drop["key"], drop["reason"]) for drop in drops} == {
        (keys[0], "empty_caption"),
        (keys[1], "unsupported_type"),
        (keys[2], "missing_key"),
    }
    assert verify_store(tmp_path / "run" / "store").ok


def _quarantine(out: Path) -> list[str]:
    files = sorted((out / "quarantine" / "captions-florence").iterdir())
    return [line for file in files for line in file.read_text().splitlines()]


def test_samples_that_the_table_lacks_are_dropped_where_that_is_wanted(keys: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", dict.fromkeys(keys[2:], "a"))
    precompute(tmp_path / "run", *NO_ENCODER, captioner(path, on_bad="drop"))
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.key for sample in store] == keys[2:]
    assert {reason for rows in store.manifest.excluded.values() for reason in rows.values()} == {"missing_key"}
    assert verify_store(tmp_path / "run" / "store").ok


def test_a_table_added_to_a_finished_run_fetches_nothing_and_changes_no_other_file(
    keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.jsonl", {key: f"a {key}" for key in keys})
    precompute(tmp_path / "run", *NO_ENCODER)
    before = store_bytes(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(FetchStage, "process", lambda *_: pytest.fail("an original was fetched"))
        precompute(tmp_path / "run", *NO_ENCODER, captioner(path))
    after = store_bytes(tmp_path / "run")
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"captions-florence"}
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    precompute(tmp_path / "fresh", *NO_ENCODER, captioner(path))
    assert store_bytes(tmp_path / "fresh") == after


def test_a_changed_table_is_refused_and_a_moved_one_is_not(keys: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", dict.fromkeys(keys, "a"))
    precompute(tmp_path / "run", *NO_ENCODER, captioner(path))
    moved = path.rename(tmp_path / "moved.jsonl")
    precompute(tmp_path / "run", *NO_ENCODER, captioner(moved))
    write(moved, dict.fromkeys(keys, "b"))
    with pytest.raises(PipelineError, match=r"captions-florence\.made_by\.sha256") as error:
        precompute(tmp_path / "run", *NO_ENCODER, captioner(moved))
    assert error.value.exit_code == StaleOutputError.exit_code
    precompute(tmp_path / "run", *NO_ENCODER, captioner(moved), restart=True)
    store = Store.open(tmp_path / "run" / "store")
    assert {sample.caption_sets["florence"][0] for sample in store} == {"b"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"key": "a", "caption": "x"}\n{"key": "a", "caption": "y"}\n', "the key 'a' is there 2 times"),
        ('{"key": "a", "caption": "x"}\n{"key"', "line 2 is not JSON"),
        ('{"id": "a", "caption": "x"}\n', "has no column 'key'"),
    ],
)
def test_a_table_that_cannot_be_used_ends_the_run_and_no_file_of_the_set_is_there(
    content: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(PipelineError, match=rf"^captioners\.florence\.\S+: .*{says}") as error:
        precompute(tmp_path / "run", *NO_ENCODER, captioner(tmp_path / "t.jsonl"))
    assert (error.value.exit_code, "\n" in str(error.value).strip()) == (2, False)
    assert not list((tmp_path / "run").glob("store/captions-florence/*"))
    (tmp_path / "t.jsonl").write_text('{"key": "a", "caption": "x"}\n')
    summary = precompute(tmp_path / "run", *NO_ENCODER, captioner(tmp_path / "t.jsonl"), restart=True)
    assert tally(summary)["drops"] == {"missing_key": KEYS}


def test_a_worker_that_finds_another_table_than_the_driver_ends_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"a": "a"})
    config = PrecomputeConfig.model_validate({"captioners": yaml.safe_load(captioner(path).partition("=")[2])})
    stages = Precompute(config).plan(RunFolder(str(tmp_path / "run"))).stages
    (stage,) = (each for each in stages if isinstance(each, TakeCaptionsStage))
    write(path, {"a": "b"})
    with pytest.raises(MachineError, match=r"captioners\.florence: this worker finds another table .* sha256"):
        stage.setup(RunFolder(str(tmp_path / "run")))


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(
    keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*NO_ENCODER, captioner(write(tmp_path / "t.jsonl", {key: f"a {key}" for key in keys[1:]})))
    precompute(tmp_path / "whole", *settings, executor="local")
    with monkeypatch.context() as patch:
        precompute_interrupted(TakeCaptionsStage, [True, False, False], tmp_path / "run", *settings, patch=patch)
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")


def test_the_command_ends_with_code_2_and_one_line_where_a_key_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("key,caption\na,x\na,y\n")
    command = ("run", "precompute", "--out", str(tmp_path / "run"), "--executor", "inline")
    result = call(*command, *NO_ENCODER, captioner(tmp_path / "t.csv"))
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if "the key 'a' is there 2 times" in line]
    assert [line.startswith("error: captioners.florence.path: ") for line in lines] == [True]
