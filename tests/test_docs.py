"""What the documents show works as shown."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from imagen_core.train import TrainConfig
from pipeline.config import load_config
from tests.commands import call
from tests.runs import REPOSITORY, precompute
from workflows.precompute import PrecomputeConfig

DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]


def blocks(language: str) -> list[str]:
    """The fenced blocks of this language in all documents."""
    found: list[str] = []
    for document in DOCUMENTS:
        inside: tuple[str, list[str]] | None = None
        for line in document.read_text("utf-8").splitlines():
            if not line.startswith("```"):
                if inside is not None:
                    inside[1].append(line)
            elif inside is None:
                inside = (line.removeprefix("```"), [])
            else:
                if inside[0] == language:
                    found.append("\n".join(inside[1]))
                inside = None
    return found


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "RUN"
    precompute(out, "source.num_samples=20", "images.sizes_px=[64,256]")
    return out


def test_the_python_examples_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = blocks("python")
    assert len(examples) >= 2
    monkeypatch.chdir(run_folder.parent)
    for example in examples:
        exec(compile(example, "<example>", "exec"), {"__name__": "__main__"})


def test_the_yaml_examples_are_valid_configurations(tmp_path: Path) -> None:
    examples = blocks("yaml")
    assert examples
    for example in examples:
        (tmp_path / "example.yaml").write_text(example)
        settings = yaml.safe_load(example)
        if not settings.keys() <= PrecomputeConfig.model_fields.keys():
            demo = yaml.safe_load((REPOSITORY / "workflows/configs/train/demo-sr.yaml").read_text())
            TrainConfig.model_validate({**demo, **settings})
            continue
        config = load_config(PrecomputeConfig, tmp_path / "example.yaml")
        assert config.source.kind == settings.get("source", {"kind": "synthetic"})["kind"]


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("pipeline ")]


def test_every_command_shown_exists_with_its_options() -> None:
    shown = commands()
    assert len(shown) > 8
    helps: dict[tuple[str, ...], str] = {}
    for words in shown:
        name = tuple(words[1:3]) if words[1] == "config" else (words[1],)
        if name not in helps:
            result = call(*name, "--help")
            assert result.code == 0, result.err
            helps[name] = result.out
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
