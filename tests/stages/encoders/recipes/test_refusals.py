"""What does not fit a recipe ends a run before its first shard: exit code 2, one line with key, value and remedy."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import Store
from tests.commands import Result, precompute
from tests.stages.encoders import tiny_models
from tests.stages.encoders.recipes.pipelines import decoder, write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(decoder("Qwen3"), tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer has neither a chat template nor a token for padding."""
    folder = tiny_models.write(decoder("Qwen3"), tmp_path_factory.mktemp("models") / "bare")
    write_tokenizer(folder, "$A", pad_token=None, chat=None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def run(folder: Path, model: Path, captions: list[str], **settings: Any) -> Result:
    pq.write_table(pa.table({"caption": captions}), folder / "captions.parquet")
    encoder = {"name": "text", "kind": "auto", "model": str(model), "compute_dtype": "float32", "num_gpus": 0}
    source = {"kind": "parquet", "path": str(folder / "captions.parquet"), "image_column": None}
    sections = {"source": source, "images": {"sizes_px": []}, "encoders": [{**encoder, **settings}]}
    return precompute(folder / "run", *(f"{key}={json.dumps(value)}" for key, value in sections.items()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"template": {"prefix": "a {style} of "}},
            ["encoders.0.template.prefix", "names the field {style}", "put the text before the caption into prefix"],
        ),
        ({"layers": [1, 9]}, ["encoders.text.layers: 9: ", "the model has 3 layers", "give indices from 0"]),
        ({"layers": ["5:"]}, ["encoders.text.layers: 5:: ", "the model has 3 layers", "give indices from 0"]),
        (
            {"template": {"prefix": "See: "}, "drop_prefix": 40},
            ["encoders.text.drop_prefix: 40 rows are dropped", "has only 6 tokens", "drop fewer"],
        ),
        ({"drop_prefix": 1}, ["encoders.text.drop_prefix: 1 rows are dropped", "only 1 tokens", "drop fewer"]),
        (
            {"template": {"prefix": "See: ", "suffix": "."}, "max_tokens": 5},
            ["encoders.text.max_tokens is 5, which the template before the caption fills", "raise it, or drop"],
        ),
    ],
)
def test_a_setting_that_the_model_does_not_fit(
    settings: dict[str, Any], says: list[str], model: Path, tmp_path: Path
) -> None:
    assert_refused(run(tmp_path, model, ["a cat"], **settings), says)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"template": {"chat": {}}}, ["encoders.text.template.chat: ", "has no chat template", "write the text out"]),
        ({"pads": {"to": 128}}, ["encoders.text.pads: ", "has no pad_token", "use mode: zeroed, or name one"]),
    ],
)
def test_a_tokenizer_that_lacks_what_the_recipe_needs(
    settings: dict[str, Any], says: list[str], bare: Path, tmp_path: Path
) -> None:
    assert_refused(run(tmp_path, bare, ["a cat"], **settings), says)


def test_a_model_of_images_alone(model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path / "vision")
    (folder / "config.json").write_text('{"model_type": "siglip_vision_model", "hidden_size": 8}')
    says = ["encoders.model: ", "is no text encoder (model_type 'siglip_vision_model'", "give its text part"]
    assert_refused(run(tmp_path, folder, ["a cat"]), says)


def test_a_folder_of_a_whole_pipeline(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    copy(model, tmp_path / "pipeline" / "text_encoder")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    says = ["encoders.model: ", "has model_index.json", "copy the files of its folders text_encoder and tokenizer"]
    assert_refused(run(tmp_path, tmp_path / "pipeline", ["a cat"]), says)


def assert_refused(result: Result, says: list[str]) -> None:
    assert result.code == 2, result.err
    (line,) = result.err.splitlines()
    for part in says:
        assert part in line


def copy(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# ---- what is refused of a caption alone ----


@pytest.mark.slow
def test_a_caption_of_which_cleaning_or_dropping_leaves_nothing_is_a_counted_drop(model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path / "model")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "boom"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    settings = {"cleaning": ["html"], "template": {"prefix": "See: "}, "drop_prefix": "prefix", "empty": "plain"}
    done = run(tmp_path, folder, ["a cat", "boom", "&nbsp;", "a dog"], **settings)
    assert done.code == 0, done.err
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.captions for sample in store] == [["a cat"], ["a dog"]]
    assert [len(sample.text["text"][0]) for sample in store] == [5, 5]
    rows = [json.loads(row) for row in (tmp_path / "run" / "quarantine" / "text-text" / "00000.jsonl").open()]
    assert [(row["reason"], row["detail"]) for row in rows] == [("no_tokens", "'boom'"), ("no_tokens", "'&nbsp;'")]
