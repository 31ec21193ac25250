"""What the documents show works as shown."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from imagen_core.train import TrainConfig
from pipeline.config import load_config
from pipeline.planning.hardware import Hardware, load_profile
from tests.commands import call
from tests.documents import DOCUMENTS, blocks, python_blocks
from tests.named_tests import missing_tests, named_tests
from tests.runs import REPOSITORY, precompute
from workflows.precompute_config import PrecomputeConfig

TUTORIAL = REPOSITORY / "docs" / "tutorial" / "first-model.md"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "RUN"
    precompute(out, "source.num_samples=20", "images.sizes_px=[64,256]")
    return out


def test_the_python_examples_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = blocks("python", [document for document in DOCUMENTS if document != TUTORIAL])
    assert len(examples) >= 5
    monkeypatch.chdir(run_folder.parent)
    Path("ART").symlink_to(run_folder)
    for example in examples:
        exec(compile(example, "<example>", "exec"), {"__name__": "__main__"})


def test_the_yaml_examples_are_valid_configurations(tmp_path: Path) -> None:
    examples = blocks("yaml")
    assert examples
    for example in examples:
        (tmp_path / "example.yaml").write_text(example)
        settings = yaml.safe_load(example)
        if settings.keys() <= Hardware.model_fields.keys():
            load_config(Hardware, {**load_profile("h200x8").model_dump(mode="json"), **settings})
            continue
        if not settings.keys() <= PrecomputeConfig.model_fields.keys():
            demo = yaml.safe_load((REPOSITORY / "workflows/configs/train/demo-sr.yaml").read_text())
            TrainConfig.model_validate({**demo, **settings})
            continue
        config = load_config(PrecomputeConfig, tmp_path / "example.yaml")
        assert config.source.kind == settings.get("source", {"kind": "synthetic"})["kind"]


def commands(documents: Iterable[Path] = DOCUMENTS) -> list[list[str]]:
    lines = "\n".join(blocks("", documents)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("pipeline ")]


def test_every_command_shown_exists_with_its_options() -> None:
    shown = commands()
    assert len(shown) > 8
    helps: dict[tuple[str, ...], str] = {}
    for words in shown:
        name = tuple(words[1:3]) if words[1] == "config" else (words[1],)
        if name not in helps:
            helps[name] = call(*name, "--help").out
        options = [word for word in words if word.startswith("-")]
        assert all(option in helps[name] for option in options), words


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(
        r"(?m)(?:^|`|\$ )make ([a-z-]+)(?=`|$| +#)", "".join(d.read_text("utf-8") for d in DOCUMENTS)
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_to_files_resolve() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.slow
def test_the_tutorials_commands_go_from_a_folder_of_images_to_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them as shown, but for the numbers of steps."""
    monkeypatch.chdir(tmp_path)
    (program,) = python_blocks(TUTORIAL)
    exec(program, {})
    assert len(list(Path("shapes").glob("*.txt"))) == len(list(Path("shapes").glob("*.png"))) == 512
    shown = commands([TUTORIAL])
    assert [words[1] for words in shown] == ["doctor", "run", "verify", "inspect", "report", "run", "run", "run"]
    for words in shown[1:]:
        result = call(*(re.sub(r"^num_steps=\d+$", "num_steps=2", word) for word in words[1:]))
        assert result.code == 0, f"{words}\n{result.out}\n{result.err}"
    assert sorted(path.name for path in Path("samples/images-64").glob("*.png")) == ["00000.png", "00001.png"]
    assert Path("samples/grid.png").is_file()


def test_the_tree_in_readme_names_every_folder_of_the_packages() -> None:
    (tree,) = (block for block in blocks("text", [REPOSITORY / "README.md"]) if block.startswith("pipeline/"))
    named, package = [], ""
    for line in tree.splitlines():
        folder = line.split()[0]
        package = package if line.startswith(" ") else folder
        named.append(folder if folder == package else package + folder)
    assert [name for name in named if not (REPOSITORY / name).is_dir()] == []
    packages = [REPOSITORY / name for name in ("pipeline", "stages", "imagen_core")]
    folders = [
        f"{path.parent.relative_to(REPOSITORY)}/" for package in packages for path in package.glob("*/__init__.py")
    ]
    assert sorted(set(folders) - set(named)) == []


def test_every_page_is_in_the_sites_navigation_and_in_the_index() -> None:
    folder = REPOSITORY / "docs"
    navigation = (REPOSITORY / "mkdocs.yml").read_text("utf-8")
    index = (folder / "index.md").read_text("utf-8")
    pages = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.md"))]
    assert [page for page in pages if f"- {page}\n" not in navigation] == []
    assert [
        page for page in pages if f"]({page})" not in index and not page.startswith(("index", "reference/api/"))
    ] == []


def test_every_promise_about_object_storage_names_tests_that_exist() -> None:
    text = (REPOSITORY / "docs/how-to/storage.md").read_text("utf-8").partition("which test shows it")[2]
    promises = [line for line in text.splitlines() if line.startswith("| ") and line != "| promise | test |"]
    assert len(promises) > 15
    assert [line for line in promises if not any(test for _, test in named_tests(line))] == []
    assert missing_tests(text) == []


def test_the_site_shows_a_link_to_a_file_of_the_repository_as_its_path_and_keeps_links_to_pages() -> None:
    spec = importlib.util.spec_from_file_location("site_links", REPOSITORY / "docs" / "site_links.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = SimpleNamespace(file=SimpleNamespace(src_path="reference/coverage.md"))
    text = "[loop](../../imagen_core/samplers/loop.py), [train](../how-to/train.md#keys), ![grid](../cascade.png)"
    shown = hook.on_page_markdown(text, page=page, config=None, files=None)
    assert shown == "`imagen_core/samplers/loop.py`, [train](../how-to/train.md#keys), ![grid](../cascade.png)"


def test_pipeline_version_prints_the_installed_version() -> None:
    result = call("--version")
    assert (result.code, result.out.strip()) == (0, f"pipeline {version('imagen-precompute')}")


def test_the_changelog_has_a_dated_section_for_the_packages_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    first = re.search(r"(?m)^## \[([^\]]+)\] - (\d{4}-\d{2}-\d{2})$", (REPOSITORY / "CHANGELOG.md").read_text("utf-8"))
    assert first is not None
    assert first[1] == project["version"]


def test_the_tour_of_the_code_names_files_and_folders_that_exist() -> None:
    table = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8").partition("## How to add")[0]
    named = [path for row in re.findall(r"(?m)^\| `.*", table) for path in re.findall(r"`([\w/]+(?:/|\.py))`", row)]
    assert len(named) > 30
    assert [path for path in named if "/" in path and not (REPOSITORY / path).exists()] == []
