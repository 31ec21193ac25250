"""A trained model as one file: it samples and starts other trainings as its checkpoint does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from imagen_core.train import CheckpointError, load_checkpoint, train
from imagen_core.train.checkpoints.single_file import write_model
from tests.imagen_core.train.small import make_config, tensors


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(make_config(store, num_steps=2), out)
    return out


def test_a_file_brings_weights_configuration_and_encoder(run: Path, tmp_path: Path) -> None:
    for weights in ("model", "ema-0.5", None):
        saved = load_checkpoint(run, weights)
        write_model(tmp_path / "model.safetensors", saved)
        loaded = load_checkpoint(tmp_path / "model.safetensors")
        assert loaded.denoiser.config == saved.denoiser.config
        for field in ("encoder", "embed_encoders", "step", "weights", "max_tokens"):
            assert getattr(loaded, field) == getattr(saved, field)
        expected = saved.denoiser.state_dict()
        for name, values in loaded.denoiser.state_dict().items():
            assert torch.equal(values, expected[name]), name
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def test_an_export_is_the_same_file_each_time(run: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(run)
    path = tmp_path / "model.safetensors"
    exported = set()
    for _ in range(8):  # the library's order of metadata is another one for each file
        write_model(path, saved)
        exported.add(path.read_bytes())
    assert len(exported) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata().keys() == {"format", "imagen", "sha256"}


def test_a_file_that_was_changed_anywhere_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, load_checkpoint(run))
    written = path.read_bytes()
    places = {"a weight": len(written) - 2, "its own digest": written.index(b'"sha256":"') + 20}
    places["the configuration"] = written.index(b'\\"step\\": 2') + len(b'\\"step\\": ')
    for place in places.values():
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed since it was written"):
            load_checkpoint(path)
    path.write_bytes(written)
    assert load_checkpoint(path).step == 2


def test_a_file_of_an_earlier_version_without_a_digest_is_read(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, load_checkpoint(run))
    with safe_open(path, framework="pt") as file:
        entries = {name: value for name, value in file.metadata().items() if name != "sha256"}
        save_file({name: file.get_tensor(name) for name in file.keys()}, path, metadata=entries)  # noqa: SIM118
    assert load_checkpoint(path).step == 2


@pytest.mark.slow
def test_a_training_starts_with_a_single_file(run: Path, store: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", load_checkpoint(run))
    started = [
        tensors(train(make_config(store, num_steps=1, init_from={"path": str(source)}), tmp_path / name)["checkpoint"])
        for source, name in ((run, "a"), (tmp_path / "model.safetensors", "b"))
    ]
    assert started[0].keys() == started[1].keys()
    assert all(torch.equal(started[0][name], started[1][name]) for name in started[0])


def test_other_files_are_refused(run: Path, tmp_path: Path) -> None:
    plain, broken = tmp_path / "plain.safetensors", tmp_path / "broken.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    broken.write_bytes(b"no tensors")
    lacks = r"plain.safetensors: its metadata do not fit: step: is missing; denoiser.*pipeline export"
    with pytest.raises(CheckpointError, match=lacks):
        load_checkpoint(plain)
    with pytest.raises(CheckpointError, match=r"broken.safetensors: is not safetensors"):
        load_checkpoint(broken)
    write_model(plain, load_checkpoint(run, "model"))
    with pytest.raises(CheckpointError, match=r"has no weights 'ema-0.9', but 'model' alone"):
        load_checkpoint(plain, "ema-0.9")


@pytest.mark.parametrize("place", [-1, 500, 2000])
def test_a_changed_byte_of_an_export_is_found(run: Path, tmp_path: Path, place: int) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, load_checkpoint(run))
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: (was changed since it was written|is not safetens)"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "six"}, r"step: input should be a valid integer \(got 'six'\)"),
        ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
        ({"encoder": 5}, "encoder: "),
        ({"embed_encoders": {"text_embed": {}}}, "embed_encoders.text_embed.name: is missing"),
        ({"denoiser": [1]}, "denoiser: input should be a valid dictionary"),
        ({"weights": None}, "weights: input should be a valid string"),
    ],
)
def test_metadata_of_another_type_are_refused_by_name(run: Path, tmp_path: Path, change: dict, words: str) -> None:
    written, path = tmp_path / "written.safetensors", tmp_path / "model.safetensors"
    write_model(written, load_checkpoint(run))
    with safe_open(written, framework="pt") as file:
        metadata = json.loads(file.metadata()["imagen"])
    save_file({"a": torch.zeros(1)}, path, metadata={"imagen": json.dumps(metadata | change)})
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)
