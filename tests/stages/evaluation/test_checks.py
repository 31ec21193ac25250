"""What can be known of an evaluation in seconds is known before any feature is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from imagen_core.evaluation.lpips import Lpips
from imagen_core.images import write_png
from stages.evaluation.features.clip import ClipFeatures
from stages.evaluation.features.lpips import LpipsDistance
from tests.commands import Result, call
from tests.stages.encoders import tiny_models


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images, features, and models."""
    root = tmp_path_factory.mktemp("checks")
    tiny_models.write(tiny_models.clip, root / "clip")
    torch.manual_seed(0)
    save_torch({name: value.abs() for name, value in Lpips("alex").state_dict().items()}, root / "lpips.safetensors")
    for folder, sides in {"images": [32, 32, 32], "smaller": [32, 16, 32], "fewer": [32, 32], "one": [32]}.items():
        for number, side in enumerate(sides):
            write_png(root / folder / f"{number}.png", np.full((side, side, 3), 40 * number, np.uint8))
    (root / "empty").mkdir()
    (root / "file").write_text("")
    save_file({"features": np.ones((1, 4), np.float32)}, root / "one.safetensors", {"label": "CLIP other"})
    np.save(root / "one.npy", np.ones((1, 4), np.float32))
    cut = (root / "clip/model.safetensors").read_bytes()[:-9]
    tiny_models.write(tiny_models.clip, root / "cut")
    (root / "cut/model.safetensors").write_bytes(cut)
    (root / "cut.safetensors").write_bytes((root / "lpips.safetensors").read_bytes()[:-9])
    return root


def images(name: str) -> dict[str, object]:
    return {"kind": "folder", "path": name}


CLIP = {"kind": "clip", "model": "clip"}


def evaluate(work: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **config: object) -> Result:
    """An evaluation that must not come to any image."""

    def early(*_: Any, **__: Any) -> None:
        raise AssertionError("features are computed before this was found")

    monkeypatch.chdir(work)
    monkeypatch.setattr(ClipFeatures, "extract", early)
    monkeypatch.setattr(LpipsDistance, "distances", early)
    (out / "e.yaml").write_text(yaml.safe_dump(config))
    return call("run", "evaluate", "-c", f"{out}/e.yaml", "--out", f"{out}/run", "--quiet")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": images("empty")}, "reference.path: empty holds no images; give a folder"),
        ({"reference": images("absent")}, "reference.path: absent does not exist; give a folder"),
        ({"reference": images("file")}, "reference.path: file is a file; give a folder"),
        ({"reference": {"kind": "store", "path": "absent"}}, "absent"),
        ({"reference": {"kind": "features", "path": "absent.npy"}}, "reference.path: absent.npy cannot be read"),
        ({"reference": images("one")}, "generated and reference: features: "),
        ({"reference": {"kind": "features", "path": "one.npy"}}, "generated and reference: features: "),
        ({"reference": {"kind": "features", "path": "one.safetensors"}}, "different models: CLIP clip and CLIP other"),
        ({"generated": images("one")}, "generated and reference: features: "),
        ({"num_neighbours": 3}, "3"),
        ({"clip": {"model": "clip"}}, "clip: the CLIP score needs captions, and generated has none"),
        ({"clip": {"model": "clip", "max_tokens": 900}}, "encoder clip: max_tokens is 900"),
        ({"clip": {"model": "cut"}}, "cut/model.safetensors cannot be loaded"),
        ({"features": {"kind": "clip", "model": "s3://bucket/clip"}}, "s3://bucket/clip is a URL; give a hub id"),
        ({"lpips": {"path": "cut.safetensors"}}, "lpips.path: cut.safetensors: "),
        ({"lpips": {"path": "one.safetensors"}}, "lpips.path: one.safetensors: "),
        ({"lpips": {"path": "lpips.safetensors"}, "reference": images("fewer")}, "lpips: 3 images in generated and 2"),
        (
            {"lpips": {"path": "lpips.safetensors"}, "reference": images("smaller")},
            "lpips: image 1 is 32 px and the one it is compared with 16 px; give equal sizes",
        ),
    ],
)
def test_what_makes_an_evaluation_impossible_is_found_before_any_feature_is_computed(
    changes: dict[str, Any], words: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"generated": images("images"), "reference": images("images"), "features": CLIP, **changes}
    result = evaluate(work, tmp_path, monkeypatch, **config)
    assert result.code in (2, 4)
    assert words in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run/features").exists()
