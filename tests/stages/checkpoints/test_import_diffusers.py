"""`pipeline import diffusers`: DeepFloyd IF's pipelines become checkpoints that sample, and what is refused."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from imagen_core.conversion.deepfloyd import published_sampling
from imagen_core.conversion.deepfloyd_unet import unet_weights
from imagen_core.train import load_checkpoint
from pipeline.errors import ConfigError, MachineError
from pipeline.storage.files import unfinished_folder
from stages.checkpoints.diffusers_files import find_pipeline, weight_files
from stages.checkpoints.import_diffusers import CLASSES
from stages.encoders.tiny import write_tiny_model
from tests.commands import Result, call
from tests.diffusers_layout import SCHEDULERS, SIZES, UNETS, unet_state, write_json, write_pipeline

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Stages I and II."""
    return [write_pipeline(tmp_path / f"IF-{number}", number) for number in (1, 2)]


def imported(*folders: Path, out: Path, encoder: str | None = "tiny-random-t5") -> Result:
    more = () if encoder is None else ("--encoder-model", encoder)
    return call("import", "diffusers", *map(str, folders), "--out", str(out), *more)


def weights_of(folder: Path) -> Path:
    return folder / f"unet/{STEM}.safetensors"


def test_both_stages_become_checkpoints_whatever_their_order(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = imported(*folders[::-1], out=out)
    assert result.code == 0, result.err
    assert f"{folders[1]} -> {out}/unet-1/checkpoints/step-00000000" in result.out
    for number in (1, 2):
        loaded = load_checkpoint(out / f"unet-{number - 1}")
        expected = unet_weights(unet_state(number), loaded.stage.unet)  # type: ignore[arg-type]
        found = dict(loaded.denoiser.net.named_parameters())
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in expected)
        assert (loaded.stage.size_px, loaded.max_tokens) == (SIZES[number], 77)
        assert loaded.encoder is not None
        fingerprint = loaded.encoder["fingerprint"]
        assert (fingerprint["cleaning"], fingerprint["max_tokens"]) == (["deepfloyd"], 77)
        assert fingerprint["pads"]["to"] == 77
    assert load_checkpoint(out / "unet-1").stage.low_res_px == SIZES[1]
    stages = yaml.safe_load((out / "sample.yaml").read_text())["stages"]
    assert [stage["sampling"] for stage in stages] == [
        published_sampling(low_res=low_res) for low_res in (False, True)
    ]


def test_one_stage_may_be_imported_alone(folders: list[Path], tmp_path: Path) -> None:
    for folder, size in zip(folders, SIZES.values(), strict=True):
        out = tmp_path / f"run-{size}"
        assert imported(folder, out=out).code == 0
        assert load_checkpoint(out / "unet-0").stage.size_px == size
        assert not (out / "unet-1").exists()


def test_the_same_import_again_changes_nothing_and_another_is_refused(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert imported(*folders, out=out).code == 0
    assert imported(*folders, out=out).code == 0
    save_file(unet_state(1, seed=1), weights_of(folders[0]))
    result = imported(*folders, out=out)
    assert result.code == 2
    assert "holds another import; give a new folder" in result.err


@pytest.mark.slow
def test_an_imported_cascade_samples(folders: list[Path], tmp_path: Path) -> None:
    out, generated = tmp_path / "run", tmp_path / "generated"
    assert imported(*folders, out=out).code == 0
    command = ["run", "sample", "-c", str(out / "sample.yaml"), "--out", str(generated), "--quiet"]
    steps = [f"stages.{index}.sampling.num_steps=2" for index in (0, 1)]
    result = call(*command, "prompts=[a small red circle]", "device=cpu", "encoder_model=tiny-random-t5", *steps)
    assert result.code == 0, result.err
    assert Image.open(generated / f"images-{SIZES[2]}/00000.png").size == (SIZES[2], SIZES[2])


def test_the_text_encoder_of_a_pipeline_is_taken_with_its_tokenizer(folders: list[Path], tmp_path: Path) -> None:
    with_encoder(folders[0], tmp_path / "tiny")
    out = tmp_path / "run"
    result = imported(*folders, out=out, encoder=None)
    assert result.code == 0, result.err
    names = {path.name for path in (out / "text_encoder").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert yaml.safe_load((out / "sample.yaml").read_text())["encoder_model"] == str(out / "text_encoder")
    encoder = load_checkpoint(out / "unet-0").encoder
    assert encoder is not None
    assert encoder["dim"] == 64
    assert imported(*folders, out=out, encoder=None).code == 0, "the same import again"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("parts", [1, 3])
def test_weights_in_parts_or_pickled_are_the_same_network(kind: str, parts: int, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "IF", 1, weights=False)
    state = unet_state(1)
    names = sorted(state)
    for part in range(parts):
        chosen = {name: state[name] for name in names[part::parts]}
        suffix = "" if parts == 1 else f"-{part + 1:05d}-of-{parts:05d}"
        file = folder / f"unet/{STEM}{suffix}.{kind}"
        save_file(chosen, file) if kind == "safetensors" else torch.save(chosen, file)
    write_json(folder / f"unet/{STEM}.{kind}.index.json", {"weight_map": {}})
    found = find_pipeline(str(folder), CLASSES).unet_tensors()
    assert found.keys() == state.keys()
    assert all(found[name].equal(state[name]) for name in state)


def test_which_file_of_weights_is_read() -> None:
    names = [f"{STEM}.bin", f"{STEM}.fp16.safetensors", "config.json", f"{STEM}.safetensors.index.json"]
    assert weight_files(names, "unet") == [f"{STEM}.fp16.safetensors"], "rather than a pickle"
    assert weight_files([*names, f"{STEM}.safetensors"], "unet") == [f"{STEM}.safetensors"]
    parts = [f"{STEM}-{number:05d}-of-00002.safetensors" for number in (2, 1)]
    assert weight_files([*names, *parts], "unet") == parts[::-1]
    assert weight_files([*names, *parts, f"{STEM}.safetensors"], "unet") == [f"{STEM}.safetensors"]
    assert weight_files([f"{STEM}.fp16-00001-of-00001.bin", f"{STEM}.non_ema.bin"], "unet") == [
        f"{STEM}.fp16-00001-of-00001.bin"
    ]
    with pytest.raises(ConfigError, match=f"unet: part 2 of 3 of {STEM} is missing"):
        weight_files([f"{STEM}-00001-of-00003.bin", f"{STEM}-00003-of-00003.bin"], "unet")


class Harmful:
    """Runs something when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_with_code_is_refused_and_runs_nothing(folders: list[Path], tmp_path: Path) -> None:
    weights_of(folders[0]).unlink()
    torch.save({"conv_in.weight": Harmful(tmp_path / "ran")}, folders[0] / f"unet/{STEM}.bin")
    result = imported(*folders, out=tmp_path / "run")
    assert result.code == 2
    assert f"{STEM}.bin: cannot be read as tensors" in result.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def spoiled(folder: Path, what: str) -> str:
    """Changes a pipeline, and returns the words that it is refused with."""
    unet, weights = folder / "unet/config.json", weights_of(folder)
    match what:
        case "latent upscaler":
            write_json(folder / "model_index.json", {"_class_name": "StableDiffusionUpscalePipeline"})
            return "names a StableDiffusionUpscalePipeline, and only IFPipeline and IFSuperResolutionPipeline can be"
        case "no index":
            (folder / "model_index.json").unlink()
            return "model_index.json: is missing; give a complete pipeline in diffusers' layout"
        case "no unet":
            shutil.rmtree(folder / "unet")
            return "unet/config.json: is missing"
        case "no scheduler":
            (folder / "scheduler/scheduler_config.json").unlink()
            return "scheduler/scheduler_config.json: is missing"
        case "no weights":
            weights.unlink()
            return f"unet: has no {STEM}.safetensors or .bin"
        case "no json":
            unet.write_text("{")
            return "unet/config.json: cannot be read as JSON"
        case "a list":
            write_json(unet, [])
            return "unet/config.json: must be a JSON object (got a list)"
        case "a cut file":
            weights.write_bytes(weights.read_bytes()[:1000])
            return f"{STEM}.safetensors: cannot be read as safetensors"
        case "other shapes":
            save_file(unet_state(1) | {"conv_in.weight": torch.zeros(32, 4, 3, 3)}, weights)
            return "unet: the weights do not fit config.json: conv_in.weight has shape (32, 4, 3, 3)"
        case "no tensor":
            state = unet_state(1)
            state.pop("conv_out.bias")
            save_file(state, weights)
            return "the weights do not fit config.json: conv_out.bias is missing"
        case "no tensors":
            weights.unlink()
            torch.save([1, 2], folder / f"unet/{STEM}.bin")
            return f"{STEM}.bin: is not a mapping from names to tensors"
        case "other blocks":
            write_json(unet, UNETS[1] | {"norm_num_groups": 8})
            return "cannot be built here: norm_num_groups is 8"
        case "no divisor":
            write_json(unet, UNETS[1] | {"resnet_out_scale_factor": 0})
            return "cannot be built here: block_divisor: Input should be greater than 0"
        case "other scheduler":
            write_json(folder / "scheduler/scheduler_config.json", SCHEDULERS[1] | {"_class_name": "LCMScheduler"})
            return "cannot be built here: scheduler: LCMScheduler has no counterpart here"
        case "other class":
            index = json.loads((folder / "model_index.json").read_text())
            write_json(folder / "model_index.json", index | {"_class_name": CLASSES[1]})
            return "is a IFSuperResolutionPipeline, but its UNet reads 3 channels"
        case "no class":
            write_json(folder / "model_index.json", {})
            return "model_index.json names no class, and only IFPipeline and"
        case "a word for a number":
            settings = {"thresholding": True, "dynamic_thresholding_ratio": "high"}
            write_json(folder / "scheduler/scheduler_config.json", SCHEDULERS[1] | settings)
            return "cannot be followed here: threshold.percentile: Input should be a valid number"
        case "not finite":
            state = unet_state(1)
            state["conv_out.bias"][0] = torch.inf
            save_file(state, weights)
            return f"{folder}: conv_out.bias (its name here) has values that are not finite"
        case "other width":
            write_json(unet, UNETS[1] | {"encoder_hid_dim": 32})
            return "the network reads 32-wide embeddings, but tiny-random-t5 is 64 wide"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        *("latent upscaler", "no index", "no unet", "no scheduler", "no weights", "no json", "a list", "a cut file"),
        *("other shapes", "no tensor", "no tensors", "other blocks", "no divisor", "other scheduler", "other class"),
        *("no class", "a word for a number", "not finite", "other width"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "IF", 1)
    words = spoiled(folder, what)
    result = imported(folder, out=tmp_path / "run")
    assert result.code == 2, result.err
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["IF"]


def with_encoder(folder: Path, scratch: Path) -> Path:
    """Gives a pipeline a text encoder and a tokenizer; returns the folder of the first."""
    write_tiny_model(scratch)
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir()
    for file in scratch.iterdir():
        file.rename(folder / ("tokenizer" if file.name.startswith("tokenizer") else "text_encoder") / file.name)
    scratch.rmdir()
    return folder / "text_encoder"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[1]"])
def test_a_damaged_text_encoder_is_named_by_its_own_folder(name: str, content: bytes, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "IF", 1)
    encoder = with_encoder(folder, tmp_path / "tiny")
    (encoder / name).write_bytes(content)
    result = imported(folder, out=tmp_path / "run", encoder=None)
    assert result.code == 4
    assert f"encoders.model: {encoder}" in result.err
    assert "copy or download the model again" in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["IF"]


def test_a_missing_part_of_the_text_encoder_is_named_and_no_other_encoder_taken(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "IF", 1)
    encoder = with_encoder(folder, tmp_path / "tiny")
    (encoder / "model.safetensors").rename(encoder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(encoder / "model.safetensors.index.json", {"weight_map": parts})
    result = imported(folder, out=tmp_path / "run", encoder=None)
    assert result.code == 2
    assert f"{encoder}/{parts['b']}: is missing, but model.safetensors.index.json names it" in result.err


def test_a_second_import_into_the_same_folder_waits_for_the_first(folders: list[Path], tmp_path: Path) -> None:
    with unfinished_folder(tmp_path / "run") as folder:
        (folder / "half").write_text("of the first")
        result = imported(folders[0], out=tmp_path / "run")
        assert result.code == 4
        assert f"--out {tmp_path}/run: another process is writing it; wait for its end" in result.err
        assert (folder / "half").exists()
    assert imported(folders[0], out=tmp_path / "run").code == 0


def test_the_printed_commands_work_in_folders_with_spaces(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "IF", 1)
    out = tmp_path / "my öwn model"
    commands = [shlex.split(line) for line in imported(folder, out=out).out.splitlines()[-2:]]
    assert [words[words.index("-c") + 1] for words in commands] == [f"{out}/sample.yaml", f"{out}/unet-0/train.yaml"]


def test_stages_that_do_not_fit_together_are_refused(folders: list[Path], tmp_path: Path) -> None:
    result = imported(folders[0], folders[0], out=tmp_path / "run")
    assert result.code == 2
    assert f"{folders[0]}: is a second IFPipeline; give one pipeline for each stage" in result.err
    write_json(folders[1] / "unet/config.json", UNETS[2] | {"encoder_hid_dim": 32})
    result = imported(*folders, out=tmp_path / "run")
    assert result.code == 2
    assert "the stages read embeddings of different widths" in result.err
    shutil.rmtree(folders[1] / "image_noising_scheduler")
    result = imported(*folders, out=tmp_path / "run")
    assert result.code == 2
    assert "image_noising_scheduler is missing" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["nowhere", "./no/where", "/no/where", "~/no/where", "a/b/c"])
def test_a_place_that_is_neither_a_folder_nor_a_hub_id_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="is not a folder; give a pipeline saved by diffusers, or a hub id"):
        find_pipeline(place, CLASSES)


def test_a_hub_id_is_found_in_the_local_cache(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def cached(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(folders[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    found = find_pipeline("DeepFloyd/IF-I-M-v1.0", CLASSES)
    assert [path.name for path in found.weights] == [f"{STEM}.safetensors"]
    (request,) = asked
    assert request["repo"] == "DeepFloyd/IF-I-M-v1.0"
    assert request["local_files_only"] is True
    assert not any(pattern.startswith(("text_encoder", "safety_checker")) for pattern in request["allow_patterns"])


def test_a_cached_pipeline_of_another_class_is_refused_without_a_network(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(folders[0] / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folders[0]))
    with pytest.raises(ConfigError, match=r"some/model: .* names a StableDiffusionPipeline"):
        find_pipeline("some/model", CLASSES)


def test_of_a_pipeline_on_the_hub_only_what_is_read_is_downloaded(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    names = [f"unet/{STEM}.fp16.safetensors", f"unet/{STEM}.safetensors", f"unet/{STEM}.bin", "text_encoder/model.bin"]

    def download(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError(repo)
        asked.append(options["allow_patterns"])
        return str(folders[1])

    class Hub:
        def model_info(self, repo: str) -> Any:
            siblings = [type("Sibling", (), {"rfilename": name}) for name in names]
            return type("Info", (), {"sha": "0" * 40, "siblings": siblings})

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert find_pipeline("DeepFloyd/IF-II-L-v1.0", CLASSES).class_name == CLASSES[1]
    assert [pattern for pattern in asked[-1] if STEM in pattern] == [f"unet/{STEM}.safetensors"]
    assert not any(STEM in pattern for pattern in asked[0])


def test_a_hub_id_that_cannot_be_reached_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("huggingface_hub.HfApi", offline)
    with pytest.raises(MachineError, match="is neither a local folder, nor cached, nor reachable on the hub"):
        find_pipeline("DeepFloyd/IF-I-M-v1.0", CLASSES)


def test_the_fixture_has_the_tensors_that_the_import_expects(folders: list[Path]) -> None:
    assert load_file(weights_of(folders[0])).keys() == unet_state(1).keys()
