"""Training and sampling from the command line, on a small real store."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from imagen_core.store import StoreError
from imagen_core.train import StoreLostError, trainer
from imagen_core.train.data.store import opened_again
from imagen_core.train.data.stream import Batch, BatchStream
from tests.commands import call, call_process, precompute
from tests.runs import REPOSITORY, command
from tests.trained import BASE, train, write_cascade


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, and a base and a super-resolution model trained on it."""
    return write_cascade(tmp_path_factory.mktemp("cascade"))


def sample(work: Path, out: Path, *more: str, stages: tuple[str, ...] = ("base", "sr")):
    few = {"num_steps": 2}
    config = {"stages": [{"checkpoint": str(work / stage), "sampling": few} for stage in stages], "device": "cpu"}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return call("run", "sample", "-c", str(path), "--out", str(out), "--quiet", "--json", *more)


def weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(sorted((out / "checkpoints").iterdir())[-1] / "model.safetensors")


def test_training_leaves_checkpoints_metrics_and_a_summary(work: Path) -> None:
    out = work / "base"
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    facts = json.loads((out / "summary.json").read_text())["summary"]
    assert (facts["steps"], facts["samples"]) == (6, 23)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert not any(path.suffix in (".pt", ".pth", ".pkl", ".ckpt") for path in out.rglob("*"))
    status = json.loads(call("status", str(out), "--json").out)
    assert (status["workflow"], status["outcome"], status["metrics"]) == ("train", "finished", lines[-1])
    assert re.search(r"^step +6 *$", call("status", str(out)).out, re.MULTILINE)


def test_the_same_command_again_trains_no_step(work: Path) -> None:
    before = weights(work / "base")
    facts = json.loads((work / "base" / "summary.json").read_text())["summary"]
    assert train(work, "base", work / "base").code == 0
    again = json.loads((work / "base" / "summary.json").read_text())["summary"]
    assert {name: again[name] for name in ("loss", "images_per_s")} == {
        name: facts[name] for name in ("loss", "images_per_s")
    }
    assert all(np.array_equal(before[name], value) for name, value in weights(work / "base").items())


@pytest.mark.slow
def test_more_steps_go_on_from_the_checkpoint(work: Path, tmp_path: Path) -> None:
    assert train(work, "base", tmp_path / "whole", "num_steps=8").code == 0
    assert train(work, "base", tmp_path / "parts", "num_steps=4").code == 0
    assert train(work, "base", tmp_path / "parts", "num_steps=8").code == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_dry_run_says_parameters_memory_and_data(work: Path) -> None:
    result = call("run", "train", "-c", str(work / "sr.yaml"), "--dry-run", "--json")
    facts = json.loads(result.out)["summary"]
    assert facts["parameters"] == sum(value.size for value in weights(work / "sr").values())
    assert facts["optimizer_bytes"] == 8 * facts["parameters"]
    assert facts["memory_bytes"] > 20 * facts["parameters"]
    assert facts["store_groups_needed"] == ["images-32", "images-16", "text-t5"]
    assert facts["samples_seen"] == 24
    assert facts["store_now"].startswith("23 samples: 1.0 epochs")
    wider = call("run", "train", "-c", str(work / "sr.yaml"), "--dry-run", "--json", "denoiser.unet.text_dim=32")
    assert "text_dim is 32" in json.loads(wider.out)["summary"]["store_now"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("denoiser.unet.text_dim=32", "text_dim is 32, but the embeddings of 't5' in the store are 64 wide"),
        ("text=clip", "the store has no encoder 'clip'"),
        ("denoiser.size_px=64", "has no images-64"),
        ("batch_size=0", "batch_size"),
        ("optimizer.betas=[0.9,1.5]", "betas: each must be in [0, 1) (got 1.5)"),
        ("denoiser.unet.preset=nemo", "there is none of this name"),
        ("denoiser.unet.familly=regular", "familly"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(work: Path, tmp_path: Path, override: str, words: str) -> None:
    result = train(work, "base", tmp_path / "out", override)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_another_model_in_the_same_folder_is_refused(work: Path) -> None:
    kept = ("config.yaml", "summary.json", "plan.json")
    before = [(work / "base" / name).read_bytes() for name in kept]
    result = train(work, "base", work / "base", "denoiser.unet.embed_dim=64", "num_steps=9")
    assert result.code == 2
    assert "unet.embed_dim: 32 -> 64" in result.err
    assert "use another --out" in train(work, "base", work / "base", "--restart").err
    assert [(work / "base" / name).read_bytes() for name in kept] == before


def test_a_loss_that_is_not_finite_is_a_failure_and_no_usage_error(work: Path, tmp_path: Path) -> None:
    result = train(work, "base", tmp_path / "nan", "optimizer.lr=1e30", "optimizer.warmup_steps=0")
    assert result.code == 1
    assert "the batch's keys are in" in result.err


@pytest.mark.parametrize(("gone", "code"), [("store/images-16/00000.parquet", 4), ("store", 75)])
def test_a_training_that_loses_its_store_saves_and_says_how_to_go_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str, code: int
) -> None:
    shutil.copytree(work / "run/store", tmp_path / "store")

    class Losing(BatchStream):
        steps = 0

        def next(self) -> Batch:
            batch, self.steps = super().next(), self.steps + 1
            if self.steps < 2:
                return batch
            where = tmp_path / gone
            shutil.rmtree(where) if where.is_dir() else where.unlink()
            missing = StoreError("images-16/00000.parquet: missing")
            with pytest.raises(StoreLostError) as caught:
                opened_again(self._stores, self._config, missing, online=False)
            return replace(batch.part(0, 0), error=caught.value)

    monkeypatch.setattr(trainer, "BatchStream", Losing)
    result = train(work, "base", tmp_path / "out", f"store={tmp_path}/store")
    assert result.code == code, result.err
    assert "the checkpoint of step 1 is saved" in result.err
    assert "run the same command again to go on from there" in result.err
    assert "made it again" not in result.err
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000001"]


def test_a_store_of_another_encoder_is_refused(work: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert precompute(other, "source.num_samples=24", "images.sizes_px=[16]", "encoders.0.max_tokens=5").code == 0
    result = train(work, "base", work / "base", f"store={other}/store", "num_steps=9")
    assert result.code == 2
    assert "fingerprint.max_tokens: 128 -> 5" in result.err


def test_sampling_writes_every_stage_and_a_grid(work: Path, tmp_path: Path) -> None:
    prompts = "prompts=[a small red circle on the left,a large blue square on the right]"
    result = sample(work, tmp_path / "s", prompts, "num_images_per_prompt=2", "seed=5")
    assert result.code == 0, result.err
    for size in (16, 32):
        for index in range(4):
            assert Image.open(tmp_path / "s" / f"images-{size}" / f"{index:05d}.png").size == (size, size)
    record = json.loads((tmp_path / "s" / "images.json").read_text())
    assert [p["seed"] for p in record["images"]] == [5, 6, 7, 8]
    assert (tmp_path / "s" / "grid.png").exists()
    assert json.loads(result.out)["summary"]["generated_now"] == 4


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch_and_are_not_generated_twice(work: Path, tmp_path: Path) -> None:
    prompts = "prompts=[a small red circle,a large blue square on the right,a star]"
    one, three = tmp_path / "one", tmp_path / "three"
    assert sample(work, one, prompts, "batch_size=1").code == 0
    assert sample(work, three, prompts, "batch_size=3").code == 0
    for image in sorted(one.glob("images-*/*.png")):
        a, b = (np.asarray(Image.open(p)).astype(int) for p in (image, three / image.relative_to(one)))
        assert np.abs(a - b).max() <= 1
    (one / "images-32" / "00001.png").unlink()
    again = sample(work, one, prompts, "batch_size=3")
    assert json.loads(again.out)["summary"]["generated_now"] == 1
    other = sample(work, one, "prompts=[a triangle]")
    assert other.code == 2
    assert "holds images of other settings" in other.err
    assert call("run", "sample", "-c", str(one.with_suffix(".yaml")), "--out", str(one), "prompts=[a triangle]",
                "--restart", "--quiet").code == 0  # fmt: skip
    assert [p.name for p in (one / "images-32").iterdir()] == ["00000.png"]


def test_an_image_is_super_resolved_without_the_base(work: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "in.png")
    result = sample(work, tmp_path / "up", f"low_res=[{tmp_path}/in.png]", "prompts=[a red image]", stages=("sr",))
    assert result.code == 0, result.err
    assert [p.name for p in (tmp_path / "up").glob("images-*")] == ["images-32"]
    missing = sample(work, tmp_path / "no", "prompts=[a red image]", stages=("sr",))
    assert missing.code == 2
    assert "needs a low-resolution image" in missing.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prompts=[]", "prompts: none given"),
        ("prompts_file=absent.txt", "absent.txt: cannot be read"),
        ("seeds=[1,2]", "seeds: 2 given for 1 images"),
        ("stages.0.checkpoint=absent", "stages.0.checkpoint: absent: has no checkpoint"),
        ("stages.0.weights=ema-0.5", "has no weights 'ema-0.5'"),
        ("encoder_model=absent/model", "neither a local folder"),
        ("device=gpu9", "device: 'gpu9'"),
        ("device=cuda:64", "device: 'cuda:64' is not there"),
        ("low_res=[absent.png]", "low_res: the first stage (16 px) is a base model"),
        ("init.images=[absent.png]", "absent.png: cannot be read"),
    ],
)
def test_bad_sampling_input_is_named(work: Path, tmp_path: Path, override: str, words: str) -> None:
    first = [] if override.startswith("prompts") else ["prompts=[a star]"]
    result = sample(work, tmp_path / "s", *first, override)
    assert result.code in (2, 4)
    assert words in result.err
    assert "Traceback" not in result.err


def test_low_res_images_do_not_depend_on_the_batch_and_are_identified_by_content(work: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for name, size in (("small", 16), ("large", 64)):
        Image.fromarray(noise[:size, : size + 8]).save(tmp_path / f"{name}.png")
    arguments = (f"low_res=[{tmp_path}/small.png,{tmp_path}/large.png]", "prompts=[a,b]")
    for size in (1, 2):
        assert sample(work, tmp_path / str(size), *arguments, f"batch_size={size}", stages=("sr",)).code == 0
    for index in range(2):
        a, b = (np.asarray(Image.open(tmp_path / s / f"images-32/{index:05d}.png")).astype(int) for s in "12")
        assert np.abs(a - b).max() <= 1
    Image.fromarray(255 - noise).save(tmp_path / "large.png")
    changed = sample(work, tmp_path / "1", *arguments, stages=("sr",))
    assert changed.code == 2
    assert "large.png" in changed.err


def test_the_centre_square_of_a_wide_image_is_kept_and_not_squashed(work: Path, tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "in.png")
    Image.new("RGB", (40, 16), (255, 255, 255)).save(tmp_path / "mask.png")
    arguments = (f"inpaint.image={tmp_path}/in.png", f"inpaint.mask={tmp_path}/mask.png", "prompts=[a]")
    assert sample(work, tmp_path / "s", *arguments, stages=("base",)).code == 0
    generated = np.asarray(Image.open(tmp_path / "s/images-16/00000.png")).astype(int)
    assert np.abs(generated - wide[:, 12:28]).max() <= 1


def test_a_failed_first_try_does_not_bind_the_folder(work: Path, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(b"no image")
    arguments = (f"low_res=[{tmp_path}/in.png]", "prompts=[a]")
    assert sample(work, tmp_path / "s", *arguments, stages=("sr",)).code == 2
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    assert sample(work, tmp_path / "s", *arguments, "seed=3", stages=("sr",)).code == 0


@pytest.mark.slow
def test_training_imports_no_ray_transformers_or_img2dataset(work: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.cli import main as cli\n"
        f"sys.argv = ['pipeline', 'run', 'train', '-c', {str(work / 'base.yaml')!r}, '--out', {str(tmp_path / 'o')!r},"
        " '--quiet', 'num_steps=1']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'ray', 'transformers', 'img2dataset'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_resumes(
    work: Path, tmp_path: Path, number: int, code: int
) -> None:
    arguments = ["run", "train", "-c", str(work / "base.yaml"), "num_steps=60", "checkpoints.every_steps=1000"]
    arguments += ["optimizer.warmup_steps=2", "--out"]
    process = subprocess.Popen(command(*arguments, str(tmp_path / "a")), cwd=REPOSITORY, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not (tmp_path / "a" / "metrics.jsonl").exists() or not (tmp_path / "a" / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    [checkpoint] = (tmp_path / "a" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 2 <= step < 60
    shown = errors.decode().splitlines()
    assert shown[0].startswith("model efficient of 16 px, ")
    name = signal.Signals(number).name
    assert f"{name}: finishing the current step; send it again to stop at once" in shown
    assert f"stopped after step {step}, and saved its checkpoint" in shown
    assert shown[-1].endswith("; run the same command again to resume")
    for out in ("a", "b"):
        assert call_process(*arguments, str(tmp_path / out), cwd=REPOSITORY).code == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(np.array_equal(a[name], b[name]) for name in b)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_train_gives_the_same_model(work: Path, tmp_path: Path) -> None:
    exact = ("precision=float64", "--quiet", "--out")
    assert train(work, "base", tmp_path / "alone", "precision=float64").code == 0
    arguments = ["run", "train", "-c", str(work / "base.yaml"), *exact, str(tmp_path / "ray")]
    result = call_process(*arguments, "--executor", "ray", "workers.num_workers=2", cwd=REPOSITORY, timeout_s=280)
    assert result.code == 0, result.err
    facts = [json.loads((tmp_path / name / "summary.json").read_text())["summary"] for name in ("ray", "alone")]
    assert facts[0]["steps"] == facts[1]["steps"] == 6
    assert facts[0]["loss"] == pytest.approx(facts[1]["loss"])
    ray, alone = weights(tmp_path / "ray"), weights(tmp_path / "alone")
    for name, values in alone.items():
        np.testing.assert_allclose(ray[name], values, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_train_ends_well_on_an_object_store(work: Path) -> None:
    """Only the first worker has the files of a checkpoint there."""
    from pipeline.storage.open import open_storage
    from tests.object_store import object_store

    with object_store() as s3:
        arguments = ["run", "train", "-c", str(work / "base.yaml"), "--quiet", "--out", f"{s3.url}/ray"]
        result = call_process(*arguments, "--executor", "ray", "workers.num_workers=2", cwd=REPOSITORY, timeout_s=280)
        assert result.code == 0, result.err
        facts = open_storage(f"{s3.url}/ray").read_json("summary.json")["summary"]
        assert facts.get("checkpoint") == f"{s3.url}/ray/checkpoints/step-00000006", facts
        assert "step-00000006/model.safetensors" in s3.keys("ray/checkpoints/")


@pytest.mark.slow
def test_training_and_sampling_go_from_s3_to_s3_and_go_on_after_a_stop(work: Path, tmp_path: Path) -> None:
    from pipeline.storage.open import open_storage
    from tests.object_store import object_store

    with object_store() as s3:
        data = open_storage(f"{s3.url}/data")
        for path in (work / "run/store").rglob("*"):
            if path.is_file():
                data.write(f"store/{path.relative_to(work / 'run/store').as_posix()}", path.read_bytes())
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({"store": f"{s3.url}/data/store", **BASE}))
        for steps in (3, 6):
            result = call(
                "run",
                "train",
                "-c",
                str(tmp_path / "base.yaml"),
                "--out",
                f"{s3.url}/train",
                "--quiet",
                f"num_steps={steps}",
            )
            assert result.code == 0, result.err
        found = s3.keys("train/checkpoints/")
        expected = work / "base/checkpoints/step-00000006"
        assert found["step-00000006/model.safetensors"] == (expected / "model.safetensors").read_bytes()
        assert open_storage(f"{s3.url}/train").read_json("summary.json")["summary"]["checkpoint"] == (
            f"{s3.url}/train/checkpoints/step-00000006"
        )
        stages = [{"checkpoint": f"{s3.url}/train", "sampling": {"num_steps": 2}}]
        (tmp_path / "sample.yaml").write_text(yaml.safe_dump({"stages": stages, "device": "cpu"}))
        result = call(
            "run",
            "sample",
            "-c",
            str(tmp_path / "sample.yaml"),
            "--out",
            f"{s3.url}/sample",
            "--quiet",
            "prompts=[a red circle]",
        )
        assert result.code == 0, result.err
        assert "images-16/00000.png" in s3.keys("sample/")
        assert "grid.png" in s3.keys("sample/")

        one_file = tmp_path / "model.safetensors"
        assert call("export", f"{s3.url}/train", "--out", str(one_file)).code == 0
        data.write(one_file.name, one_file.read_bytes())
        stages = f"stages=[{{checkpoint: {s3.url}/data/{one_file.name}, sampling: {{num_steps: 2}}}}]"
        result = call(
            *("run", "sample", "--out", str(tmp_path / "generated"), "--quiet", "prompts=[a red circle]"),
            *("device=cpu", stages),
        )
        assert result.code == 0, result.err
        generated = open_storage(f"{s3.url}/sample").read("images-16/00000.png")
        assert (tmp_path / "generated/images-16/00000.png").read_bytes() == generated
        for source in (f"{s3.url}/train", (work / "base").as_uri()):
            out = tmp_path / source.partition(":")[0]
            result = call(
                *("run", "train", "-c", str(tmp_path / "base.yaml"), "--out", str(out), "--quiet", "num_steps=1"),
                f"init_from.path={source}",
            )
            assert result.code == 0, result.err
            assert json.loads((out / "start.json").read_text())["step"] == 6
