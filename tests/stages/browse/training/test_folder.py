"""Configuration, starts, grids and state of a training."""

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage
from pipeline.storage.run_folder import RunFolder
from stages.browse.training.folder import (
    config_differences,
    config_text,
    grid_name,
    grid_steps,
    starts_of,
    state_of,
)
from tests.stages.browse.training.trainings import training


def test_settings_that_differ_are_named_with_their_value_in_each(tmp_path: Path) -> None:
    configs = {"a": "seed: 1\nema: {rates: [0.9]}\nwhere: null\n", "b": "seed: 2\nema: {rates: [0.9]}\n"}
    storages = [LocalStorage(training(tmp_path / name, "", config)) for name, config in configs.items()]
    assert config_differences(storages) == [("seed", ("1", "2")), ("where", ("null", None))]
    assert config_differences(storages[:1] * 3) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("- 1\n", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("a: " + "x" * 2**20, "more than 1 MiB"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
            "100,000 values",
        ),
    ],
)
def test_a_configuration_that_cannot_be_compared_is_one_line_that_names_it(
    tmp_path: Path, config: str, words: str
) -> None:
    storage = LocalStorage(training(tmp_path / "a", "", config))
    with pytest.raises(ConfigError, match=words) as caught:
        config_differences([storage, storage])
    assert "config.yaml" in str(caught.value)


def test_a_folder_without_configuration_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        config_text(LocalStorage(tmp_path))


def test_grids_are_those_of_steps_and_nothing_else(tmp_path: Path) -> None:
    root = training(tmp_path, "", grids=[500, 1000, 20])
    for name in (".tmp-step-00000001.png", "step-1.png", "step-00000001.png.part", "other.png"):
        (root / "grids" / name).write_bytes(b"")
    assert grid_steps(LocalStorage(root)) == [20, 500, 1000]
    assert (root / grid_name(20)).is_file()
    assert grid_steps(LocalStorage(tmp_path / "none")) == []


def test_starts_are_read_up_to_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    lines = [
        {"time": 0.0, "step": 0, "device": "cpu", "processes": 2},
        {"step": 5},
        {"time": "x", "step": 9, "processes": []},
    ]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"step": 1')
    found = [(each.step, each.when, each.device, each.processes) for each in starts_of(LocalStorage(tmp_path))]
    assert found == [(0, "1970-01-01 00:00:00 UTC", "cpu", 2), (5, "-", "-", None), (9, "-", "-", None)]


def test_a_training_is_running_while_it_holds_its_folder(tmp_path: Path) -> None:
    run = RunFolder(training(tmp_path / "a", ""))
    assert state_of(run.storage) == "not finished"
    with run.lock():
        assert state_of(run.storage) == "running"
    run.storage.write_json("summary.json", {"outcome": "finished"})
    assert state_of(run.storage) == "finished"
