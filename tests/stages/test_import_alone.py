"""A module is imported without its package's `__init__`, and as usual where that does not work."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.import_alone import import_alone


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `heavy` with an `__init__` that must not run, and a package `unwanted` that its module imports."""
    heavy, unwanted = tmp_path / "heavy", tmp_path / "unwanted"
    heavy.mkdir()
    unwanted.mkdir()
    (heavy / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (heavy / "part.py").write_text("import unwanted\nfrom .other import VALUE\nused = lambda: unwanted.NUMBER\n")
    (heavy / "other.py").write_text("VALUE = 7\n")
    (unwanted / "__init__.py").write_text(f"open({str(tmp_path / 'loaded')!r}, 'w').close()\nNUMBER = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("heavy", "_alone_heavy", "unwanted"):
            del sys.modules[name]


def test_a_module_comes_without_its_package_and_what_it_does_not_use(package: Path) -> None:
    module = import_alone("heavy.part", unused=("unwanted",))
    assert module.VALUE == 7
    assert not {"heavy", "unwanted"} & sys.modules.keys()
    assert not (package / "loaded").exists()
    assert import_alone("heavy.part", unused=("unwanted",)) is module


def test_what_was_said_to_be_unused_works_when_it_is_used(package: Path) -> None:
    module = import_alone("heavy.part", unused=("unwanted",))
    assert module.used() == 3
    assert (package / "loaded").exists()


def test_a_package_whose_module_needs_all_of_it_is_imported_as_usual(package: Path) -> None:
    (package / "heavy/__init__.py").write_text("NAME = 'whole'\n")
    (package / "heavy/part.py").write_text("from . import NAME\n")
    module = import_alone("heavy.part")
    assert (module.NAME, module.__name__) == ("whole", "heavy.part")
    assert "_alone_heavy" not in sys.modules


def test_a_broken_package_gives_its_own_error(package: Path) -> None:
    (package / "heavy/part.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(RuntimeError, match="imported"):
        import_alone("heavy.part")
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        import_alone("absent_package.part")


def test_fetching_urls_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from stages.precompute.fetch import FetchStage\n"
        "from stages.sources.urls import UrlsConfig\n"
        "FetchStage(UrlsConfig(path='urls.txt').build(), 'urls').setup(None)\n"
        "heavy = {'img2dataset', 'webdataset', 'wandb', 'albumentations', 'cv2', 'pandas', 'torch', 'ray'}\n"
        "print(sorted(heavy & sys.modules.keys()), '_alone_img2dataset.downloader' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[] True\n", "")
