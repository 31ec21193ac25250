"""N30: NeMo's .nemo and .ckpt become checkpoints, draw, and train on."""

import io
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from imagen_core.train import load_checkpoint
from tests.commands import Result, call
from tests.imagen_core.conversion.nemo.numbers import weights
from tests.imagen_core.conversion.nemo.test_nemo import EXPECTED, changed

TEXT = {"conditioning": {"embed_dim": 64, "token_length": 6, "drop_rate": 0.1}, "data": {"train": {}}, "seed": 1234}
BASE: dict[str, Any] = changed(EXPECTED["base fused"]["model"], image_size=4, attention_resolutions=[2]) | TEXT
SUPER: dict[str, Any] = (
    changed(EXPECTED["sr-unet with noise"]["model"], image_size=16, attention_resolutions=[8]) | TEXT
)


def state_of(case: str) -> dict[str, torch.Tensor]:
    """As NeMo saves it, of a model that reads 64 instead of 32 features."""
    shapes = dict(EXPECTED[case]["shapes"])
    for name in ("attention_pooling.0.W.weight", "attention_pooling.2.weight", "text_to_cond.weight"):
        shapes[name] = [shapes[name][0], 64]
    shapes |= {"attention_pooling.1.weight": [64], "attention_pooling.1.bias": [64]}
    return {f"model.model.unet.{name}": values for name, values in weights(shapes).items()}


STATES = {"base": state_of("base fused"), "super": state_of("sr-unet with noise")}


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def write_nemo(path: Path, model: object, state: object, mode: str = "w", name: str = "./model_weights.ckpt") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for member, content in (("./model_config.yaml", yaml.safe_dump(model).encode()), (name, saved(state))):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def imported(out: Path, *files: Path, encoder: str = "tiny-random-t5") -> Result:
    return call("import", "nemo", *map(str, files), "--out", str(out), "--encoder-model", encoder)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_nemo(tmp_path / "base.nemo", BASE, STATES["base"])


@pytest.mark.slow
def test_a_cascade_of_nemo_becomes_checkpoints_that_draw(base: Path, tmp_path: Path) -> None:
    larger, out = tmp_path / "sr.ckpt", tmp_path / "run"
    larger.write_bytes(
        saved({"state_dict": STATES["super"], "optimizer_states": [], "hyper_parameters": {"cfg": SUPER}})
    )
    result = imported(out, larger, base)
    assert result.code == 0, result.err
    assert "base.nemo -> " in result.out.splitlines()[0]
    for index, state in enumerate(STATES.values()):
        loaded = load_checkpoint(out / f"unet-{index}")
        assert (loaded.stage.size_px, loaded.stage.low_res_px) == ((4, None), (16, 4))[index]
        assert loaded.stage.diffusion.objective == "edm"
        assert loaded.encoder is not None
        assert loaded.encoder["fingerprint"]["max_tokens"] == 512
        mine = loaded.denoiser.state_dict()
        assert mine["net.conv_in.weight"].equal(state["model.model.unet.input_blocks.0.0.weight"])
    sampling = yaml.safe_load((out / "sample.yaml").read_text())["stages"][1]["sampling"]
    assert sampling == {
        "sampler": {"kind": "heun"},
        "grid": {"kind": "karras", "rho": 7.0},
        "num_steps": 50,
        "threshold": {"kind": "dynamic", "percentile": 0.995},
    }
    few = ["stages.0.sampling.num_steps=3", "stages.1.sampling.num_steps=3"]
    command = ["run", "sample", "-c", str(out / "sample.yaml"), "--out", str(tmp_path / "generated"), "--quiet"]
    result = call(*command, *few, "prompts=[a small red circle]", "device=cpu", "encoder_model=tiny-random-t5")
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "generated/images-16/00000.png").size == (16, 16)


@pytest.mark.slow
def test_an_imported_model_trains_on(cascade: Path, tmp_path: Path) -> None:
    model = changed(BASE, image_size=16, attention_resolutions=[8])
    assert imported(tmp_path / "run", write_nemo(tmp_path / "base.nemo", model, STATES["base"])).code == 0
    command = ["run", "train", "-c", str(tmp_path / "run/unet-0/train.yaml"), "--out", str(tmp_path / "on"), "--quiet"]
    result = call(*command, f"store={cascade}/run/store", "text=t5", "num_steps=1", "batch_size=2")
    assert result.code == 0, result.err
    loaded = load_checkpoint(tmp_path / "on", "model")
    assert loaded.stage.unet.padded_tokens == 6
    before = STATES["base"]["model.model.unet.init_conv.0.weight"]
    assert (loaded.denoiser.state_dict()["net.conv_in.weight"] - before).abs().max() < 1e-2


def omegaconf(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings as objects that pickle as omegaconf's do."""
    classes = {}
    for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode"):
        module, kind = f"omegaconf.{name.split('.')[0]}", name.split(".")[1]
        classes[kind] = type(kind, (), {"__module__": module})
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], kind, classes[kind])
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

    def wrapped(value: Any) -> Any:
        kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
        result = classes[kind]()
        if kind == "DictConfig":
            result._content = {key: wrapped(item) for key, item in value.items()}
        elif kind == "ListConfig":
            result._content = [wrapped(item) for item in value]
        else:
            result._val = value
        return result

    return wrapped(settings)


def of_gzip(path: Path, _: pytest.MonkeyPatch) -> Path:
    return write_nemo(path.with_suffix(".nemo"), BASE, STATES["base"], "w:gz", "model_weights.ckpt")


def of_omegaconf(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        settings = omegaconf({"cfg": BASE}, patch)
        content = {"state_dict": STATES["base"], "hyper_parameters": settings, "hparams_type": type(settings)}
        path.write_bytes(saved(content))
    return path


def with_yaml(path: Path, _: pytest.MonkeyPatch) -> Path:
    compiled = {name.replace("unet.", "unet._orig_mod."): values for name, values in STATES["base"].items()}
    path.write_bytes(saved({"state_dict": compiled}))
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"name": "imagen", "trainer": {}, "model": BASE}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("write", [of_gzip, pytest.param(of_omegaconf, marks=pytest.mark.slow), with_yaml])
def test_every_kind_of_file_is_the_same_model(
    write: Callable[[Path, pytest.MonkeyPatch], Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for number, file in enumerate((base, write(tmp_path / "other.ckpt", monkeypatch))):
        result = imported(tmp_path / f"run-{number}", file)
        assert result.code == 0, result.err
        loaded = load_checkpoint(tmp_path / f"run-{number}/unet-0")
        states.append((loaded.stage, loaded.denoiser.state_dict()))
    assert states[0][0] == states[1][0]
    assert all(values.equal(states[1][1][name]) for name, values in states[0][1].items())


@pytest.mark.parametrize(
    "folders", [("mp_rank_00", "mp_rank_01"), ("tp_rank_00_pp_rank_000", "tp_rank_00_pp_rank_001")]
)
def test_a_nemo_with_a_copy_of_each_device_is_its_model_if_they_are_equal(
    folders: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    def write(second: dict[str, torch.Tensor]) -> Path:
        path = write_nemo(tmp_path / "split.nemo", BASE, STATES["base"], name=f"./{folders[0]}/model_weights.ckpt")
        content = saved(second)
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo(f"./{folders[1]}/model_weights.ckpt")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        return path

    for run, file in (("one", base), ("split", write(STATES["base"]))):
        result = imported(tmp_path / run, file)
        assert result.code == 0, result.err
    expected, found = (load_checkpoint(tmp_path / run / "unet-0").denoiser.state_dict() for run in ("one", "split"))
    assert all(values.equal(found[name]) for name, values in expected.items())
    name = "model.model.unet.cond"
    other = STATES["base"] | {name: torch.zeros(1)}
    result = imported(tmp_path / "other", write(other))
    assert result.code == 2
    assert f"{name} is not the same in {folders[0]}/model_weights.ckpt and {folders[1]}/" in result.err
    assert not (tmp_path / "other").exists()


def test_ddpm_draws_down_to_the_lowest_level_and_to_0(tmp_path: Path) -> None:
    ddpm = {"preconditioning_type": "DDPM", "preconditioning": {"timesteps": 1000, "noise_schedule": "linear"}}
    assert imported(tmp_path / "run", write_nemo(tmp_path / "base.nemo", BASE | ddpm, STATES["base"])).code == 0
    (stage,) = yaml.safe_load((tmp_path / "run/sample.yaml").read_text())["stages"]
    assert stage["sampling"]["sampler"] == {"kind": "ancestral"}
    assert stage["sampling"]["num_steps"] == 1001


class Harmful:
    """Runs something when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".nemo", ".ckpt"])
def test_a_pickle_with_code_is_refused_and_runs_nothing(suffix: str, tmp_path: Path) -> None:
    path, bad = tmp_path / f"base{suffix}", Harmful(tmp_path / "ran")
    if suffix == ".nemo":
        write_nemo(path, BASE, STATES["base"] | {"bad": bad})
    else:
        path.write_bytes(saved({"state_dict": STATES["base"], "hyper_parameters": {"cfg": BASE}, "bad": bad}))
    result = imported(tmp_path / "run", path)
    assert result.code == 2
    assert f"base{suffix}: cannot be read as tensors" in result.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_members_of_a_nemo_are_read_in_place_and_none_is_unpacked(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(base, "a") as tar:
        for name in ("../outside", str(folder / "absolute"), "folder/inside"):
            tar.addfile(tarfile.TarInfo(name))
    before = sorted(tmp_path.rglob("*"))
    assert imported(tmp_path / "run", base).code == 0
    assert sorted(p for p in tmp_path.rglob("*") if tmp_path / "run" not in (p, *p.parents)) == before
    with tarfile.open(base, "w") as tar:  # a link is no file
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    result = imported(tmp_path / "linked", base)
    assert result.code == 2
    assert "has no model_config.yaml in it" in result.err


def test_what_cannot_be_imported_exactly_is_refused(base: Path, tmp_path: Path) -> None:
    def refused(words: str, *files: Path, encoder: str = "tiny-random-t5") -> None:
        result = imported(tmp_path / "refused", *files, encoder=encoder)
        assert result.code == 2, result.err
        assert words in result.err
        assert not (tmp_path / "refused").exists()

    def nemo(model: object, state: object = STATES["base"]) -> Path:
        return write_nemo(tmp_path / "changed.nemo", model, state)

    refused("unet.init_conv_kernel_size is 7", nemo(changed(BASE, init_conv_kernel_size=7)))
    refused("the weights do not fit the settings", nemo(changed(BASE, cond_dim=32)))
    refused("the models generate images of [4, 4] pixels", base, nemo(BASE))
    narrow = nemo(changed(SUPER, "conditioning", embed_dim=32), STATES["super"])
    refused("embeddings of different widths", base, narrow)
    refused("the network reads 32-wide embeddings, but tiny-random-t5 is 64 wide", narrow)
    refused("has no unet in it", nemo({"target": "nemo.collections.asr"}))
    refused("give a .nemo or .ckpt", tmp_path)
    refused("there is no such file", tmp_path / "none.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    refused("a folder is not read, and NeMo's Imagen saves none", tmp_path / "folder.ckpt")
    (tmp_path / "bad.nemo").write_bytes(b"no tar")
    refused("cannot be read as a .nemo", tmp_path / "bad.nemo")
    lone = tmp_path / "lone.ckpt"
    lone.write_bytes(saved({"state_dict": STATES["base"]}))
    refused(f"put the YAML it was trained with at {tmp_path}/lone.yaml", lone)
    lone.write_bytes(saved({"weights": 1}))
    refused("has no state_dict in it", lone)
