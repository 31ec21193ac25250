"""The options of the `pipeline` command itself."""

import errno
import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from imagen_core.store import Store
from pipeline.cli.main import main
from pipeline.errors import ConfigError
from tests.commands import call
from tests.runs import REPOSITORY


def test_version_prints_the_version_of_the_installed_package_and_stops() -> None:
    result = call("--version")
    assert (result.code, result.out, result.err) == (0, f"pipeline {version('imagen-precompute')}\n", "")


@pytest.mark.parametrize("command", [[], ["run"], ["config", "show"], ["inspect"]])
def test_h_is_help_for_the_command_and_its_subcommands(command: list[str]) -> None:
    short, long = call(*command, "-h"), call(*command, "--help")
    assert (short.code, short.out) == (0, long.out)
    assert " ".join(["Usage: pipeline", *command]) in short.out


@pytest.mark.parametrize("module", ["pipeline", "pipeline.cli"])
def test_the_module_is_the_command(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.returncode, result.stdout) == (0, f"pipeline {version('imagen-precompute')}\n")


@pytest.mark.parametrize(("name", "printed"), [("caf\udcff", b"caf\\udcff"), ("a→b", b"a\\u2192b")])
def test_text_that_the_terminal_cannot_show_is_escaped(
    monkeypatch: pytest.MonkeyPatch, name: str, printed: bytes
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="latin-1") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["pipeline", "status", name])

    def broken(place: str) -> dict[str, object]:
        print(place)
        raise ConfigError(f"{place}: is no run")

    monkeypatch.setattr("pipeline.engine.status.run_status", broken)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    for stream in streams:
        stream.flush()
        assert printed in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_help_of_run_lists_the_workflows() -> None:
    words = " ".join(call("run", "--help").out.replace("│", " ").split())
    assert "evaluate, export, likelihood, precompute, sample, train." in words


def images(folder: Path) -> None:
    folder.mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("red")


def test_a_tilde_is_the_home_folder_in_keys_options_and_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    images(tmp_path / "data")
    (tmp_path / "run.yaml").write_text(
        "source: {kind: folder, path: ~/data}\nimages: {sizes_px: [16]}\nencoders: []\n"
    )
    options = ("--executor", "inline", "--quiet")
    first = call("run", "precompute", "-c", "~/run.yaml", "--out=~/first", *options)
    second = call("run", "precompute", "-c", "~/run.yaml", "--out", "~/second", "source.path=~/data", *options)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (tmp_path / "first/store/manifest.json").is_file()
    assert (tmp_path / "second/store/manifest.json").is_file()
    assert call("verify", "~/first").code == 0
    assert len(Store.open("~/first/store")) == 1
    shown = call("config", "show", "sample", "stages=[{checkpoint: ~/base}]", "prompts=[a ~/ b]").out
    assert f"checkpoint: {tmp_path}/base" in shown
    assert "a ~/ b" in shown


def test_a_dry_run_of_a_restart_changes_nothing_and_says_so(tmp_path: Path) -> None:
    images(tmp_path / "data")
    words = ["run", "precompute", "--out", str(tmp_path / "run"), "--executor", "inline", "--quiet"]
    words += ["source.kind=folder", f"source.path={tmp_path}/data", "encoders=[]"]
    assert call(*words, "images.sizes_px=[16]").code == 0

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = content()
    changed = [*words, "images.sizes_px=[16]", "images.filter=box"]
    assert call(*changed, "--dry-run").code == 2
    shown = call(*changed, "--dry-run", "--restart")
    assert shown.code == 0
    assert "images-16.config.filter: bicubic -> box" in shown.out
    assert "--restart would make this again" in shown.out
    assert shown.out.endswith("dry run: nothing was changed\n")
    assert content() == before
    as_json = json.loads(call(*changed, "--dry-run", "--restart", "--json").out)
    assert any("bicubic" in line for line in as_json["rebuilt"])


def test_no_remedy_names_a_package_of_the_index_that_is_not_there() -> None:
    """This package is installed from a checkout."""
    folders = ("pipeline", "stages", "imagen_core", "workflows", "docs")
    files = [REPOSITORY / "README.md", *(path for name in folders for path in (REPOSITORY / name).rglob("*"))]
    texts = [path for path in files if path.suffix in (".py", ".md", ".yaml")]
    assert len(texts) > 100
    assert [path for path in texts if "imagen-precompute[" in path.read_text("utf-8")] == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "are free on the file system at"),
        (errno.EDQUOT, "are free on the file system at"),
        (errno.EROFS, "are free on the file system at"),
        (errno.EMFILE, "Raise the limit, as with ulimit -n"),
        (errno.EIO, "The disk, or the connection to it, failed"),
        (errno.EACCES, "This user may not do that"),
    ],
)
@pytest.mark.parametrize("command", [["verify"], ["remove", "--compact"], ["export", "--out", "{}/a.safetensors"]])
def test_what_the_machine_refuses_is_explained_whatever_the_command(
    command: list[str], number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pipeline.workflow.load_command", lambda name: refused)
    result = call(command[0], str(tmp_path), *(word.format(tmp_path) for word in command[1:]))
    assert result.code == 4
    assert result.err.startswith(f"error: {tmp_path}: ")
    assert os.strerror(number) in result.err
    assert words in result.err


def test_what_the_machine_refuses_is_explained_in_commands_that_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "plan.json"))

    monkeypatch.setattr("pipeline.engine.status.run_status", refused)
    result = call("status", str(tmp_path))
    assert (result.code, f"{tmp_path}: OSError" in result.err) == (4, True)


def test_under_torchrun_a_process_says_its_exit_code_which_torchrun_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "exit code 2 of this process; torchrun ends with 1 instead"
    alone = call("inspect", "nothing-here")
    assert (alone.code, said in alone.err) == (2, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert said in call("inspect", "nothing-here").err
