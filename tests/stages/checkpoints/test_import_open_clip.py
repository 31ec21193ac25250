"""D1: CLIPs in open_clip's own files become model folders that the encoders of kind clip read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import MachineError
from stages.encoders.clip import ClipTextConfig
from stages.encoders.clip_image import ClipImageConfig
from stages.encoders.model_files import find_model
from tests.commands import Result, call
from tests.imagen_core.conversion.minimagen.numbers import numbers, weights
from tests.stages.checkpoints.open_clip.make_expected import CASES, IDS
from tests.stages.encoders.tiny_models import tokenizer

EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "open_clip/expected.json").read_text(encoding="utf-8"))
LENGTHS = [4, 9]


def state_of(case: str) -> dict[str, Tensor]:
    """As open_clip saves it."""
    return weights(EXPECTED[case]["shapes"])


PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.1], "interpolation": "bicubic"}


def write(
    folder: Path,
    case: str,
    *,
    pickled: bool = False,
    words: bool = True,
    state: Any = None,
    preprocess: object = PREPROCESS,
    **model: object,
) -> Path:
    folder.mkdir()
    if words:
        tokenizer(folder, "</s>", "<unk> $A </s>")
    settings = {"model_cfg": CASES[case] | model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    state = state_of(case) if state is None else state
    if pickled:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(state, folder / "open_clip_model.safetensors")
    return folder


def imported(folder: Path, out: Path, *more: str) -> Result:
    return call("import", "open-clip", str(folder), "--out", str(out), *more)


def text_model(folder: Path) -> Any:
    settings = {"name": "clip", "model": str(folder), "output": "projected", "max_tokens": 9}
    config = ClipTextConfig.model_validate(settings | {"compute_dtype": "float32", "num_gpus": 0})
    assert config.identify().dim == 12
    return config.build(find_model(str(folder), None), torch.float32, torch.device("cpu"))


def embedded(model: Any) -> Tensor:
    """(2, 12): the captions of the reference, without padding."""
    ids = [ids[:length] for ids, length in zip(IDS, LENGTHS, strict=True)]
    return model(torch.tensor([number for row in ids for number in row]), LENGTHS)


@pytest.mark.parametrize("case", CASES)
def test_captions_have_the_embeddings_of_open_clip(case: str, tmp_path: Path) -> None:
    result = imported(write(tmp_path / "their", case, pickled=case == "ResNet"), tmp_path / "clip")
    assert result.code == 0, result.err
    assert ("without its image half" in result.out) == (case == "ResNet")
    expected = torch.tensor(EXPECTED[case]["text"])
    torch.testing.assert_close(embedded(text_model(tmp_path / "clip")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != "ResNet"])
def test_images_have_the_embeddings_of_open_clip_and_its_preprocessing(case: str, tmp_path: Path) -> None:
    assert imported(write(tmp_path / "their", case), tmp_path / "clip").code == 0
    folder = str(tmp_path / "clip")
    config = ClipImageConfig.model_validate({"name": "clip", "model": folder, "from_px": 16, "num_gpus": 0})
    files = find_model(folder, None)
    found = config.build(files, torch.float32, torch.device("cpu"))(numbers("pixels", (2, 3, 16, 16)))
    torch.testing.assert_close(found, torch.tensor(EXPECTED[case]["images"]), rtol=1e-5, atol=1e-5)
    preprocessing = config.preprocessing(files)
    assert (preprocessing.size_px, preprocessing.mean, preprocessing.std) == (16, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


def test_the_tokenizer_may_be_that_of_another_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "their", "ViT", words=False)
    result = imported(folder, tmp_path / "clip")
    assert result.code == 2
    assert "has no tokenizer; say with --encoder-model" in result.err
    assert not (tmp_path / "clip").exists()
    (tmp_path / "words").mkdir()
    tokenizer(tmp_path / "words", "</s>", "<unk> $A </s>")
    assert imported(folder, tmp_path / "clip", "--encoder-model", str(tmp_path / "words")).code == 0
    same = (tmp_path / name / "tokenizer.json" for name in ("words", "clip"))
    assert len({file.read_bytes() for file in same}) == 1


def test_an_encoder_of_such_a_folder_is_refused_with_the_command_that_imports_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "their", "ViT", words=False)
    with pytest.raises(
        MachineError, match=r"has open_clip's own files; .*pipeline import open-clip .*their --out FOLD"
    ):
        find_model(str(folder), None)


class Harmful:
    """Runs something when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_what_cannot_be_imported_exactly_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def refused(words: str, case: str = "ViT", **changes: Any) -> None:
        number = len(list(tmp_path.iterdir()))
        folder = write(tmp_path / f"their-{number}", case, **changes)
        result = imported(folder, tmp_path / "clip")
        assert result.code == 2, result.err
        assert words in result.err
        assert len(result.err.strip().splitlines()) == 1
        assert not (tmp_path / "clip").exists()

    text = CASES["ViT"]["text_cfg"]
    refused("model_cfg.text_cfg.no_causal_mask: is True", text_cfg=text | {"no_causal_mask": True})
    refused("model_cfg.text_cfg.pool_type: is 'last'", text_cfg=text | {"pool_type": "last"})
    refused("model_cfg.multimodal_cfg: is not of a plain CLIP", multimodal_cfg={"width": 1})
    refused("has no embed_dim, text_cfg and vision_cfg", text_cfg=None)
    refused("model_cfg.text_cfg.width: must be a positive number (got 'wide')", text_cfg=text | {"width": "wide"})
    refused("model_cfg.vision_cfg.layers: must be a positive number (got -1)", vision_cfg={"layers": -1})
    refused("preprocess_cfg.mean: must be three numbers (got 'grey')", preprocess={"mean": "grey"})
    refused("tensors do not fit open_clip_config.json (text_model.", text_cfg=text | {"layers": 3})
    refused("(more: absent by the settings, (1,) in the file)", state=state_of("ViT") | {"more": torch.zeros(1)})
    refused("cannot be read as tensors", pickled=True, state={"bad": Harmful(tmp_path / "ran")})
    assert not (tmp_path / "ran").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no open_clip_config.json" in imported(empty, tmp_path / "clip").err
    assert "is not empty; give a new folder" in imported(write(tmp_path / "last", "ViT"), tmp_path / "last").err
