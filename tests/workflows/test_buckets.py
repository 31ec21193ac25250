"""A cascade trained on aspect-ratio buckets generates images that are not square."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from imagen_core.store import Store
from stages.sources.synthetic.scenes import scene
from tests.commands import call, precompute
from tests.trained import BASE, COMMON, SUPER, UNET, train

SIZES = {"base": 32, "sr": 64}


@pytest.mark.slow
def test_a_cascade_trained_on_buckets_samples_3_to_2_and_2_to_3(tmp_path: Path) -> None:
    images = ["images.sizes_px=[32,64]", "images.aspect=buckets"]
    made = precompute(tmp_path / "run", "source.num_samples=12", "source.seed=4", *images)
    assert made.code == 0, made.err
    store = Store.open(tmp_path / "run/store")
    assert {sample.images[32].shape[:2] for sample in store} == {(24, 40), (32, 32), (40, 24)}
    base = BASE["denoiser"] | {"size_px": 32, "unet": UNET | {"image_size_px": 32}}
    upsampler = SUPER["denoiser"] | {"size_px": 64, "low_res_px": 32}
    upsampler["unet"] = UNET | {"image_size_px": 64, "low_res": True, "low_res_noise": True}
    for name, denoiser in (("base", base), ("sr", upsampler)):
        config = {"store": str(tmp_path / "run/store"), "denoiser": denoiser, **COMMON}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        trained = train(tmp_path, name, tmp_path / name, "num_steps=3")
        assert trained.code == 0, trained.err
    dry = call("run", "train", "-c", str(tmp_path / "base.yaml"), "--out", str(tmp_path / "dry"), "--dry-run")
    assert f"{len(store)} samples, 3 aspect-ratio buckets: " in " ".join(dry.out.split()), dry.out

    stages = [{"checkpoint": str(tmp_path / name), "sampling": {"num_steps": 2}} for name in SIZES]
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump({"stages": stages, "device": "cpu", "batch_size": 2}))
    held_out = [scene(7, index, "held_out").captions[0] for index in range(3)]
    prompts = f"prompts={json.dumps(held_out)}"
    for name, more in (("aspects", [prompts, "aspect=[3:2,2:3,1:1]"]), ("size", [prompts, "size=[48,80]"]),
                       ("store", ["captions.kind=store", f"captions.path={tmp_path}/run"])):  # fmt: skip
        out = str(tmp_path / name)
        done = call("run", "sample", "-c", str(tmp_path / "sample.yaml"), "--out", out, "--quiet", *more)
        assert done.code == 0, done.err
    assert sizes_of(tmp_path / "aspects") == {32: [(24, 40), (40, 24), (32, 32)], 64: [(48, 80), (80, 48), (64, 64)]}
    record = json.loads((tmp_path / "aspects/images.json").read_text())["images"]
    assert [image.get("size") for image in record] == [[48, 80], [80, 48], None]
    assert sizes_of(tmp_path / "size")[64] == [(48, 80)] * 3
    assert sizes_of(tmp_path / "store")[64] == [sample.images[64].shape[:2] for sample in store]
    again = call("run", "sample", "-c", str(tmp_path / "sample.yaml"), "--out", str(tmp_path / "aspects"), "--quiet",
                 prompts, "aspect=[3:2,3:2,1:1]")  # fmt: skip
    assert again.code == 2
    assert "size" in again.err


def sizes_of(out: Path) -> dict[int, list[tuple[int, int]]]:
    """Height and width of the images by stage."""
    found: dict[int, list[tuple[int, int]]] = {}
    for size in (32, 64):
        for path in sorted((out / f"images-{size}").glob("*.png")):
            with Image.open(path) as image:
                found.setdefault(size, []).append((image.height, image.width))
    return found
