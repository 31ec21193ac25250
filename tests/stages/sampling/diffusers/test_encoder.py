"""The text encoder of an exported cascade is copied, named, or left to the user, with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from stages.encoders.t5 import T5EncoderConfig
from stages.encoders.tiny import write_tiny_model
from stages.sampling.diffusers.encoder import export_encoder
from tests.commands import tree
from tests.stages.sampling.diffusers.models import ENCODER

pytestmark = pytest.mark.slow  # transformers takes seconds to import


def record(model: Path, **settings: Any) -> dict[str, Any]:
    """What a checkpoint has of an encoder in a local folder."""
    identity = T5EncoderConfig(name="t5", model=str(model), compute_dtype="float32", **settings).identify()
    return {"name": "t5", "dim": identity.dim, "dtype": "float16", "fingerprint": identity.fingerprint}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def test_a_given_folder_is_copied_as_the_encoder_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = export_encoder(record(model, max_tokens=20), str(model), tmp_path / "out")
    assert found.settings == {"max_tokens": 20, "embedding_dtype": "float16"}
    assert found.components["text_encoder"] == ("transformers", "T5EncoderModel")
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= tree(tmp_path / "out")


def test_another_encoder_is_refused(model: Path, tmp_path: Path) -> None:
    trained_on = record(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"relative_attention_max_distance": 64}))
    with pytest.raises(ConfigError, match=r"differs from the one .*give the right model with --encoder-model"):
        export_encoder(trained_on, str(model), tmp_path)


def test_an_encoder_of_the_hub_is_named_with_its_commit(model: Path, tmp_path: Path) -> None:
    trained_on = record(model)
    trained_on["fingerprint"] |= {"model": "owner/t5", "revision": "abc"}
    found = export_encoder(trained_on, None, tmp_path)
    assert found.settings["encoder_model"] == "owner/t5"
    assert found.settings["encoder_revision"] == "abc"
    assert "loaded from the hub" in found.remark
    assert found.components == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({}, "a local model that was not given"), ({"layers": [1]}, "in a way that this folder's code lacks")],
)
def test_an_encoder_that_cannot_go_along_is_described(
    model: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    found = export_encoder(record(model, **settings), None, tmp_path)
    assert reason in found.remark
    assert "prompt_embeds" in found.remark
    assert found.components == {}
    assert "encoder_model" not in found.settings


def test_embeddings_that_came_with_the_data_have_no_encoder(tmp_path: Path) -> None:
    found = export_encoder(ENCODER, None, tmp_path)
    assert "came with the data" in found.remark
    assert export_encoder(None, None, tmp_path).remark == "The cascade reads no captions."
