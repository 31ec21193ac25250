"""Weights on their way from files to a device."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5EncoderModel

from stages.encoders import loading
from stages.encoders.model_files import ModelFiles
from stages.encoders.tiny import write_tiny_model


class Loaded:
    """A model class that remembers how it was loaded, and where its model was moved."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.device: Any = None

    def from_pretrained(self, _: str, **options: Any) -> tuple["Loaded", dict[str, list[str]]]:
        self.options = options
        return self, {"missing_keys": []}

    def to(self, device: Any) -> "Loaded":
        self.device = device
        return self

    def eval(self) -> "Loaded":
        return self

    def requires_grad_(self, _: bool) -> "Loaded":
        return self


@pytest.mark.parametrize(
    ("device", "has_accelerate", "device_map"),
    [("cuda", True, {"": torch.device("cuda")}), ("cuda", False, None), ("cpu", True, None)],
)
def test_weights_go_straight_to_a_gpu_where_accelerate_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, has_accelerate: bool, device_map: Any
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: name if has_accelerate else None)
    model, files = Loaded(), ModelFiles(str(tmp_path), None, tmp_path, {}, {})
    loading.load_weights(model, files, torch.float32, torch.device(device))
    assert model.options.get("device_map") == device_map
    assert model.device == torch.device(device), "also where transformers did not move it"


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
def test_a_model_that_was_loaded_straight_to_a_device_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path)
    files, cpu = ModelFiles(str(tmp_path), None, tmp_path, {}, {}), torch.device("cpu")
    plain = loading.load_weights(T5EncoderModel, files, torch.float32, cpu)
    monkeypatch.setattr(loading, "_straight_to", lambda device: {"device_map": {"": device}})
    mapped = loading.load_weights(T5EncoderModel, files, torch.float32, cpu)
    ids = torch.arange(6)[None]
    assert torch.equal(plain(ids).last_hidden_state, mapped(ids).last_hidden_state)
    assert {parameter.device for parameter in mapped.parameters()} == {cpu}
    assert not any(parameter.requires_grad for parameter in mapped.parameters())
