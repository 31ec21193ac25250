"""The wheel: what it holds, and that it works outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.network import guarded
from tests.runs import REPOSITORY

pytestmark = pytest.mark.slow

PACKAGES = ("imagen_core", "pipeline", "stages", "workflows")
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the checkout gets no `build` folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *build, str(source)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `pipeline` command of a new virtual environment that has the wheel and sees the packages of this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    packages = next(environment.glob("lib/python*/site-packages"))
    seen = [path for path in sys.path if Path(path).is_dir() and Path(path).resolve() != REPOSITORY]
    (packages / "dependencies.pth").write_text("\n".join(seen) + "\n")
    return environment / "bin" / "pipeline"


def run(command: Path, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, **guarded()}
    done = subprocess.run(
        [str(command), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_has_configurations_profiles_templates_the_report_page_and_type_markers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert len([name for name in data if name.startswith("workflows/configs/") and name.endswith(".yaml")]) > 25
    assert {"stages/browse/templates/report/store.html", "stages/browse/static/browse.css"} <= set(data)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(data)
    assert any(name.endswith(".j2") for name in data)
    assert sorted(set(data) - names) == []


def test_the_wheel_has_every_module_and_neither_tests_nor_benchmarks(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        p.relative_to(REPOSITORY).as_posix() for package in PACKAGES for p in (REPOSITORY / package).rglob("*.py")
    }
    assert modules <= names
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"imagen_precompute-{VERSION}.dist-info"}


def test_the_installed_wheel_lists_configurations_and_precomputes_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    assert run(installed, "--version", folder=tmp_path).strip() == f"pipeline {VERSION}"
    assert "nemo-base64-500m" in run(installed, "config", "ls", folder=tmp_path)
    small = ["source.num_samples=4", "shard_size=4", "images.sizes_px=[16]", "max_drop_fraction=1"]
    run(installed, "run", "precompute", "--out", "run", "--executor", "inline", *small, folder=tmp_path)
    manifest = json.loads((tmp_path / "run" / "store" / "manifest.json").read_text())
    assert (manifest["num_rows"], sorted(manifest["groups"])) == (3, ["images-16", "samples", "text-t5"])
    module = subprocess.run(
        [installed.with_name("python"), "-c", "import pipeline; print(pipeline.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(module.strip()).is_relative_to(installed.parents[1])
