"""What a node says about itself."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from pipeline.executors.nodes import facts as module
from pipeline.executors.nodes.facts import listing, node_facts, versions


def fake_smi(folder: Path, script: str) -> str:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return str(folder)


def test_a_listing_changes_with_names_and_sizes_and_nothing_else(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "below").mkdir(parents=True)
        (folder / "a.bin").write_bytes(b"123")
        (folder / "below" / "b.bin").write_bytes(b"4567")
    (two / "a.bin").write_bytes(b"abc")
    first = listing(str(one))
    assert (first["files"], first["bytes"], first["problem"]) == (2, 7, "")
    assert first == listing(str(two))
    (two / "a.bin").write_bytes(b"1234")
    assert listing(str(two))["sha256"] != first["sha256"]
    (two / "a.bin").write_bytes(b"123")
    (two / "a.bin").rename(two / "c.bin")
    assert listing(str(two))["sha256"] != first["sha256"]
    assert listing(str(one / "a.bin"))["bytes"] == 3
    assert listing(str(tmp_path / "none"))["problem"] == "there is no such file or folder"


def test_of_a_folder_with_very_many_files_the_names_at_its_top_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_FILES", 2)
    (tmp_path / "below").mkdir()
    for name in ("a", "b", "below/c", "below/d"):
        (tmp_path / name).write_text(name)
    assert listing(str(tmp_path))["files"] == 3


def test_the_digest_of_code_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "made_up" / "inner").mkdir(parents=True)
    (tmp_path / "made_up" / "__init__.py").write_text("")
    (tmp_path / "made_up" / "inner" / "x.py").write_text("a = 1\n")
    first = versions((), ("made_up",))["code"]
    (tmp_path / "made_up" / "notes.txt").write_text("no code")
    assert versions((), ("made_up",))["code"] == first
    (tmp_path / "made_up" / "inner" / "x.py").write_text("a = 2\n")
    assert versions((), ("made_up",))["code"] not in (first, "")
    (tmp_path / "made_up" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    assert versions((), ("made_up",))["code"] == ""
    assert versions(("no-such-package",), ("no_such_module",)) == {
        "python": versions((), ())["python"],
        "no-such-package": "",
        "code": "",
    }


def test_gpus_are_what_the_driver_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA H200, 143771, 143009, 570.1\nNVIDIA H200, [N/A], [N/A], 570.1"
    monkeypatch.setenv("PATH", fake_smi(tmp_path, f"printf '{lines}\\n'"))
    monkeypatch.setattr(module, "_unusable_gpus", lambda: "")
    facts = node_facts((), (), "", ())
    assert facts["gpus"] == [
        {"name": "NVIDIA H200", "memory_bytes": 143771 * 2**20, "free_bytes": 143009 * 2**20, "driver": "570.1"},
        {"name": "NVIDIA H200", "memory_bytes": None, "free_bytes": None, "driver": "570.1"},
    ]
    assert facts["gpu_problem"] == ""


def test_a_driver_that_fails_is_told_from_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = node_facts((), (), "", ())
    assert (facts["gpus"], facts["gpu_problem"]) == ([], "")
    monkeypatch.setenv("PATH", fake_smi(tmp_path, "echo NVIDIA-SMI has failed; exit 9"))
    facts = node_facts((), (), "", ())
    assert (facts["gpus"], facts["gpu_problem"]) == ([], "nvidia-smi: NVIDIA-SMI has failed")


def test_a_folder_for_temporary_files_that_takes_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "none"))
    problem = node_facts((), (), "", ())["temporary"]["problem"]
    assert problem == "FileNotFoundError: No such file or directory"


def test_a_process_without_this_project_can_answer() -> None:
    cloudpickle.register_pickle_by_value(module)
    try:
        sent = cloudpickle.dumps((module.NodeProbe, module.versions))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    code = (
        "import pickle, sys\n"
        "probe, versions = pickle.loads(sys.stdin.buffer.read())\n"
        "assert 'pipeline' not in sys.modules\n"
        "answers = probe().facts(['pyarrow'], [], '', ['/none']), versions(['pyarrow'], [])\n"
        "sys.stdout.buffer.write(pickle.dumps(answers))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, cwd="/", check=True)
    facts, found = pickle.loads(done.stdout)
    assert facts["versions"] == found
    assert found["pyarrow"]
