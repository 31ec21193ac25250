"""Every key and option that takes a path takes a URL, or refuses it in words."""

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import fsspec
import numpy as np
import pytest
import typer
import yaml
from pydantic import BaseModel
from safetensors.numpy import save_file

from imagen_core.images import write_png
from pipeline.cli.main import app
from pipeline.errors import ConfigError, MachineError, PipelineError
from stages.encoders.model_files import find_model
from stages.evaluation.features.files import read_features
from stages.evaluation.features.image_sets import ImageFolder
from stages.evaluation.features.inception import InceptionFeatures
from stages.images import read_image
from stages.places import local_file, local_folder
from stages.sampling.config import RequestConfig
from stages.sampling.requests import resolve_requests
from tests.commands import call
from tests.object_store import ObjectStore, object_store

URL = "s3://bucket/place"

TAKES = {
    *(
        "out",
        "store",
        "run_or_store",
        "store_or_training",
        "run_folder",
        "training",
        "checkpoint",
        "init_from.path",
        "captions.path",
    ),
    *("generated.path", "reference.path", "features.path", "lpips.path", "logits", "clip_images", "clip_texts"),
    *("prompts_file", "low_res", "init.images", "inpaint.image", "inpaint.mask"),
    *("source.path", "source.file_list", "source.image_folder", "arrays.folder", "encoders.null", "captioners.path"),
    *(
        "image_encoders.null",
        "duplicates.exclude",
        "stores.path",
        "lora.base",
        "export.lora_base",
        "condition_images",
        "push.path",
        "report.path",
    ),
}
"""Keys and options whose value may be a URL. What is here has a test with one, here or in test_object_store.py and
test_folder_url.py, or in test_table.py."""
REFUSES = {
    "config": ["run", "precompute", "-c", f"{URL}.yaml"],
    "profile": ["plan", "precompute", "--profile", f"{URL}.yaml"],
    "write_to": ["schedule", "precompute", "--kind", "cron", "--write-to", URL],
    "import out": ["import", "nemo", "a.nemo", "--out", URL],
    "paths": ["import", "nemo", f"{URL}.nemo", "--out", "x"],
    "cache_dir": ["config", "validate", "train", "-c", "one-gpu-base64", "store=s", f"data.cache_dir={URL}"],
    "export sampling": ["export", "RUN", "--to", "diffusers", "--out", "x", "--sampling", f"{URL}.yaml"],
    "encoders.model": ["run", "precompute", "--executor", "inline", f"encoders.0.model={URL}"],
    "huggingface.path": ["run", "precompute", "source.kind=huggingface", f"source.path={URL}"],
}
"""Keys and options that need a local path, with a command line that gives a URL."""
MODELS = {"model", "encoder_model", "text_embed_model", "image_encoders.model"}
"""Names of models: all are found by one function, which refuses URLs."""
OTHER = {
    *("workflow", "overrides", "executor", "address", "retry_dropped", "kind", "at", "timezone", "image", "queue"),
    *("job", "part", "gpus", "memory", "time", "partition", "account", "qos", "targets", "image_encoder"),
    *("key", "url", "sha256", "reason", "weights", "revision", "device", "split", "name", "prompts", "transcriptions"),
    *("class_names", "user_agent_token", "disallowed_headers", "resources", "sections", "text", "text_embed"),
    *("layers", "recipe", "chat", "prefix", "suffix", "suffix_after_pads", "system", "license", "host"),
    *("captions", "caption_sets", "column", "encoders", "image_encoders", "encoder", "codec", "dtype", "to"),
    *("where", "keep_columns", "aspect", "image_embed", "match", "arrays", "array", "member", "pickle_key"),
    *("block", "api_key_env", "base_url", "prompt", "refusals", "extra_body"),
    *("negative_prompt", "architecture", "text_layers", "flags", "repo"),
}
"""Texts that are no path. What ends in `_column`, `_member` or `_field` is none either."""


def texts(annotation: Any) -> bool:
    """Whether a value may be any text."""
    if annotation is str or annotation is Path:
        return True
    return get_origin(annotation) is not None and any(map(texts, get_args(annotation)))


def keys(config: Any, name: str = "") -> Iterator[str]:
    """Every key of a configuration whose value may be any text, after the keys that it is below."""
    if isinstance(config, type) and issubclass(config, BaseModel):
        for field, info in config.model_fields.items():
            if texts(info.annotation):
                yield f"{name}.{field}"
            if name.count(".") < 6:
                yield from keys(info.annotation, f"{name}.{field}")
    elif get_origin(config) in (Union, UnionType) or get_args(config):
        for each in get_args(config):
            yield from keys(each, name)


def options(commands: typer.Typer) -> Iterator[str]:
    """Every argument and option of the command line whose value may be any text, after its command."""
    for group in commands.registered_groups:
        assert group.typer_instance is not None
        yield from options(group.typer_instance)
    for command in commands.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        hints = get_type_hints(command.callback)
        yield from (f"{name}.{option}" for option, hint in hints.items() if texts(hint))


def is_known(key: str) -> bool:
    last = key.rpartition(".")[2]
    if last in OTHER or last in MODELS or last in REFUSES or last.endswith(("_column", "_member", "_field")):
        return True
    return any(f".{key}".endswith(f".{known}") for known in TAKES) or key.replace(".", " ") in REFUSES


def test_every_key_and_option_with_a_text_is_known_as_a_place_or_as_something_else() -> None:
    workflows = [entry.load().config_class for entry in entry_points(group="pipeline.workflows")]
    found = {key for config in workflows for key in keys(config)}
    found |= set(options(app))
    assert {".generated.path", ".source.file_list", "export.out", "run.config"} <= found
    assert sorted(key for key in found if not is_known(key)) == []


@pytest.mark.parametrize("name", REFUSES)
def test_a_url_is_refused_in_words_where_only_a_local_path_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*REFUSES[name])
    assert result.code in (2, 4), result.err
    assert URL in result.err
    assert "URL" in result.err
    assert not list(tmp_path.glob("s3:*"))


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of a folder in the memory of this process."""
    files = fsspec.filesystem("memory")
    yield "memory://places"
    files.rm("/places", recursive=True)


def put(folder: Path, url: str) -> None:
    fsspec.filesystem("memory").put(f"{folder}/", f"{url}/", recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images with captions, and files of features and weights."""
    root = tmp_path / "folder"
    for name in ("b.png", "below/a.png"):
        write_png(root / name, np.full((4, 4, 3), len(name), np.uint8))
        (root / name).with_suffix(".txt").write_text(f"caption of {name}")
    np.save(root / "rows.npy", np.ones((2, 3), np.float32))
    save_file({"features": np.ones((2, 3), np.float32)}, root / "rows.safetensors")
    (root / "prompts.txt").write_text("one\ntwo\n")
    return root


def test_a_folder_behind_a_url_is_the_same_set_of_images(memory: str, folder: Path) -> None:
    put(folder, memory)
    near, far = (ImageFolder(path=path).open("generated") for path in (str(folder), memory))
    assert (far.count, far.identity, far.captions()) == (2, near.identity, near.captions())
    assert [image.tolist() for image in far.read()] == [image.tolist() for image in near.read()]
    with pytest.raises(ConfigError, match=r"generated.path: memory://places/absent holds no images"):
        ImageFolder(path=f"{memory}/absent").open("generated")


def test_files_behind_a_url_are_read_as_local_ones(memory: str, folder: Path) -> None:
    put(folder, memory)
    for name in ("rows.npy", "rows.safetensors"):
        assert read_features(f"{memory}/{name}", "field").rows.tolist() == np.ones((2, 3)).tolist()
    assert InceptionFeatures(path=f"{memory}/rows.safetensors").sha256 == (
        InceptionFeatures(path=f"{folder}/rows.safetensors").sha256
    )
    assert read_image(f"{memory}/b.png").tolist() == read_image(folder / "b.png").tolist()
    assert [each.prompt for each in resolve_requests(RequestConfig(prompts_file=f"{memory}/prompts.txt"))] == [
        "one",
        "two",
    ]
    assert local_file(f"{memory}/rows.npy").name == "rows.npy"
    assert local_file(f"file://{folder}/rows.npy") == folder / "rows.npy"


@pytest.mark.parametrize(
    "read",
    [
        lambda url: read_features(f"{url}/a.npy", "field"),
        lambda url: InceptionFeatures(path=f"{url}/a.safetensors").fingerprint(),
        lambda url: read_image(f"{url}/a.png"),
        lambda url: resolve_requests(RequestConfig(prompts_file=f"{url}/a.txt")),
    ],
    ids=["features", "weights", "image", "prompts"],
)
def test_a_url_that_leads_to_nothing_is_an_error_in_words(read: Any, memory: str, folder: Path) -> None:
    put(folder, memory)
    with pytest.raises(PipelineError, match=r"memory://places/a\.[a-z]+:? .*cannot be read"):
        read(memory)


def test_a_folder_that_is_a_file_or_absent_is_named(folder: Path) -> None:
    for name, words in (("b.png", "is a file"), ("absent", "does not exist")):
        with pytest.raises(ConfigError, match=f"field: {folder}/{name} {words}; give a folder"):
            local_folder(f"{folder}/{name}", "field", lambda _: True)


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.mark.slow
def test_a_model_is_exported_to_a_url_and_images_there_are_evaluated(
    s3: ObjectStore, cascade: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    near, far = str(tmp_path / "base.safetensors"), f"{s3.url}/models/base.safetensors"
    for out in (near, far, far):
        result = call("export", str(cascade / "base"), "--out", out)
        assert result.code == 0, result.err
    assert local_file(far).read_bytes() == Path(near).read_bytes()
    result = call("export", str(cascade / "sr"), "--out", far)
    assert (result.code, "exists, and is another model" in result.err) == (2, True)
    fsspec.filesystem("s3").put(f"{folder}/", f"{s3.url}/images/", recursive=True)
    config = {
        "generated": {"kind": "features", "logits": f"{s3.url}/images/rows.npy"},
        "num_splits": 1,
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(config))
    result = call("run", "evaluate", "-c", "e.yaml", "--out", "out", "--quiet")
    assert result.code == 0, result.err
    images = {"kind": "folder", "path": f"{s3.url}/images"}
    assert ImageFolder.model_validate(images).open("generated").count == 2
    assert not list(tmp_path.glob("s3:*"))


def test_models_are_refused_by_one_function() -> None:
    with pytest.raises(MachineError, match=r"s3://bucket/place is a URL; give a hub id, or copy the folder"):
        find_model(URL, None)
