"""The loop: what a step computes, and what happens on schedule."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_core.diffusion import Denoiser, diffusion_loss
from imagen_core.train import NonFiniteLossError, TrainError, TrainingProgress, load_checkpoint, train
from imagen_core.train import loss as loss_module
from imagen_core.train import step as step_module
from imagen_core.train.data.example import Example, make_example
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import BatchStream
from imagen_core.train.evaluation import validation_metrics
from imagen_core.train.loss import Losses, TrainingLoss
from imagen_core.train.parallel.world import World
from tests.imagen_core.models.small import random_weights
from tests.imagen_core.train.small import (
    BASE,
    BASE_UNET,
    DIM,
    SUPER,
    changed,
    make_config,
    make_context,
    metrics,
    tensors,
)

EFFICIENT = SUPER | {
    "unet": {
        "family": "efficient",
        "image_size_px": 32,
        "embed_dim": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "attention_levels": [False, True],
        "text_dim": DIM,
        "head_dim": 16,
        "low_res": True,
        "low_res_noise": True,
    },
}


@pytest.fixture(scope="module")
def three_steps(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three steps."""
    out = tmp_path_factory.mktemp("three") / "steps"
    train(make_config(store, num_steps=3), out)
    return out


@pytest.mark.parametrize("micro_batch_size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3)), 8])
def test_gradients_do_not_depend_on_micro_batches(
    store: Path, three_steps: Path, tmp_path: Path, micro_batch_size: int
) -> None:
    """MinImagen adds up the losses of micro-batches without dividing them."""
    parts = train(make_config(store, num_steps=3, micro_batch_size=micro_batch_size), tmp_path / "parts")
    for a, b in zip(metrics(three_steps), metrics(tmp_path / "parts"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-12)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-9)
    expected, found = tensors(three_steps / "checkpoints/step-00000003"), tensors(parts["checkpoint"])
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-10)


def test_a_step_is_adamw_on_the_mean_loss(store: Path, tmp_path: Path) -> None:
    """Two steps against the same written out with autograd and torch.optim."""
    config = make_config(store, num_steps=2, optimizer={"lr": 0.01, "warmup_steps": 0, "clip_norm": 0.1})
    started = train(make_config(store, num_steps=1, optimizer={"lr": 1e-30, "warmup_steps": 0}), tmp_path / "started")
    denoiser = load_checkpoint(Path(started["checkpoint"]), "model").denoiser.train().requires_grad_(True)
    plain = [p for p in denoiser.parameters() if p.ndim > 1]
    bare = [p for p in denoiser.parameters() if p.ndim <= 1]
    groups = [{"params": plain, "weight_decay": 0.01}, {"params": bare, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    stream = BatchStream(open_stores(config), config, World(0, 1, torch.device("cpu")), None)
    losses = []
    for step in range(2):
        example = make_example(stream.next(), config, denoiser, torch.device("cpu"), step)
        loss = diffusion_loss(denoiser, example.x0, example.sigma, example.noise, example.conditioning).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 0.1)
        optimizer.step()
        losses.append(float(loss.detach()))
    stream.close()
    summary = train(config, tmp_path / "run")
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx(losses, rel=1e-9)
    found = tensors(summary["checkpoint"])
    for name, values in denoiser.state_dict().items():
        torch.testing.assert_close(found[f"model/{name}"], values, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_training_learns_a_few_images(store: Path, tmp_path: Path) -> None:
    config = make_config(
        store,
        num_steps=60,
        validation={"num_samples": 32, "every_steps": 60},
        precision="float32",
        optimizer={"lr": 3e-3, "warmup_steps": 5},
    )
    train(config, tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert np.mean(losses[:5]) > 0.7
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"denoiser": SUPER, "views": {"crop_px": 16, "horizontal_flip": True}},
        {"denoiser": BASE | {"unet": BASE_UNET | {"text_dim": None, "attention_type": "self"}}, "text": None},
        {"denoiser": EFFICIENT},
        {"denoiser": BASE | {"diffusion": {"schedule": {"kind": "log_snr_cosine"}, "objective": "v"}}},
        pytest.param(
            {"denoiser": BASE | {"diffusion": {"schedule": {"kind": "discrete"}, "objective": "eps", "weight": "p2"}}},
            marks=pytest.mark.slow,
        ),
        {
            "denoiser": BASE
            | {
                "unet": BASE_UNET | {"out_channels": 6},
                "diffusion": {"schedule": {"kind": "discrete"}, "objective": "eps", "variance": "learned_range"},
            }
        },
        {"precision": "bfloat16"},
        pytest.param({"precision": "float32", "compute": {"channels_last": True}}, marks=pytest.mark.slow),
    ],
    ids=["super-resolution", "without text", "efficient", "v", "eps", "learned variance", "bfloat16", "channels last"],
)
def test_every_kind_of_stage_trains(store: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    summary = train(make_config(store, **{"num_steps": 2, "batch_size": 4, **changes}), tmp_path)
    assert (summary["steps"], summary["samples"]) == (2, 8)
    assert 0 < summary["loss"] < 10
    loaded = load_checkpoint(tmp_path)
    assert (loaded.encoder is None) == (changes.get("text", "t5") is None)


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_and_images_have_the_configured_memory_order(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    seen: list[tuple[bool, ...]] = []
    original = TrainingLoss.forward

    def note(self: TrainingLoss, example: Example) -> Losses:
        kernels = [p for p in self.denoiser.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        tensors = [*kernels, example.x0]
        seen.append(tuple({t.is_contiguous(memory_format=torch.channels_last) for t in tensors}))
        return original(self, example)

    monkeypatch.setattr(TrainingLoss, "forward", note)
    train(make_config(store, num_steps=1, compute={"channels_last": channels_last}), tmp_path)
    assert seen == [(channels_last,)]


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing_but_memory(store: Path, tmp_path: Path) -> None:
    recomputing = BASE | {"unet": BASE_UNET | {"activation_checkpointing": True, "dropout": 0.2}}
    keeping = BASE | {"unet": BASE_UNET | {"dropout": 0.2}}
    found = [
        tensors(train(make_config(store, num_steps=2, denoiser=denoiser), tmp_path / name)["checkpoint"])
        for name, denoiser in (("keeping", keeping), ("recomputing", recomputing))
    ]
    for key, values in found[0].items():
        torch.testing.assert_close(found[1][key], values, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_dropout_is_sampled_again_in_each_step_and_the_same_on_resume(store: Path, tmp_path: Path) -> None:
    config = make_config(store, num_steps=3, batch_size=4, denoiser=BASE | {"unet": BASE_UNET | {"dropout": 0.3}})
    straight = train(config, tmp_path / "a")
    train(config.model_copy(update={"num_steps": 1}), tmp_path / "b")
    torch.manual_seed(123)
    resumed = train(config, tmp_path / "b")
    expected, found = tensors(straight["checkpoint"]), tensors(resumed["checkpoint"])
    assert all(torch.equal(found[key], values) for key, values in expected.items())


def test_metrics_and_progress_say_where_it_is(store: Path, tmp_path: Path) -> None:
    shown: list[TrainingProgress] = []
    config = make_config(store, num_steps=5, logging={"every_steps": 2}, optimizer={"lr": 0.5e-3, "warmup_steps": 5})
    train(config, tmp_path, on_progress=shown.append)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [progress.step for progress in shown] == [2, 4, 5]
    assert [line["samples"] for line in lines] == [16, 32, 40]
    assert [line["lr"] for line in lines] == pytest.approx([2e-4, 4e-4, 5e-4])
    for line, progress in zip(lines, shown, strict=True):
        assert (progress.loss, progress.num_steps) == (line["loss"], 5)
        assert 0 <= line["loader_wait"] < 1
        assert line["images_per_s"] == pytest.approx(8 / line["step_s"])
        assert line["peak_memory_bytes"] > 10**7


@pytest.mark.slow
def test_metrics_are_means_since_the_last_line(store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=4, logging={"every_steps": 1}), tmp_path / "each")
    train(make_config(store, num_steps=4, logging={"every_steps": 2}), tmp_path / "second")
    each = [line["loss"] for line in metrics(tmp_path / "each")]
    assert [line["loss"] for line in metrics(tmp_path / "second")] == pytest.approx(
        [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2]
    )


@pytest.mark.slow
def test_waiting_for_data_is_measured(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = BatchStream._epoch

    def slow(self: BatchStream) -> Any:
        for batch in read(self):
            time.sleep(0.4)
            yield batch

    monkeypatch.setattr(BatchStream, "_epoch", slow)
    slowed = train(make_config(store, num_steps=3, logging={"every_steps": 3}), tmp_path / "slow")
    monkeypatch.setattr(BatchStream, "_epoch", read)
    plain = train(make_config(store, num_steps=3, logging={"every_steps": 3}), tmp_path / "plain")
    assert slowed["loader_wait"] > plain["loader_wait"] + 0.05


@pytest.mark.slow
def test_validation_is_the_same_whenever_it_is_done(store: Path, tmp_path: Path) -> None:
    """Same weights, same loss: noise, noise levels and captions are fixed, and nothing is dropped."""
    frozen = make_config(
        store,
        num_steps=3,
        validation={"num_samples": 10, "every_steps": 1},
        optimizer={"lr": 1e-30, "warmup_steps": 0, "weight_decay": 0.0},
        denoiser=BASE | {"unet": BASE_UNET | {"dropout": 0.5}},
        views={"horizontal_flip": True},
    )
    summary = train(frozen, tmp_path / "a")
    lines = [line for line in metrics(tmp_path / "a") if "validation_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["validation_loss"] for line in lines] == pytest.approx([summary["validation_loss"]] * 3, rel=1e-12)
    assert lines[0]["validation_loss_without_ema"] == pytest.approx(lines[0]["validation_loss"], rel=1e-12)
    other = frozen.model_copy(update={"batch_size": 5, "micro_batch_size": 2})
    assert train(other, tmp_path / "b")["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-12)


@pytest.mark.slow
def test_validation_has_a_level_for_each_low_resolution_image_and_blurs_none(store: Path) -> None:
    values = []
    for per, blur in (("sample", None), ("batch", None), ("sample", {"probability": 1.0, "sigma": 2.0})):
        denoiser_config = SUPER | {"low_res_noise": {"kind": "lognormal", "per": per}}
        config = make_config(
            store, denoiser=denoiser_config, views={"low_res_blur": blur}, validation={"num_samples": 10}
        )
        torch.manual_seed(0)
        denoiser = random_weights(Denoiser(config.denoiser).double()).eval()
        values.append(validation_metrics(make_context(config, denoiser))["validation_loss"])
    assert values[0] == values[1] == values[2]


@pytest.mark.slow
def test_validating_does_not_change_training(store: Path, tmp_path: Path) -> None:
    quiet = make_config(store, num_steps=2, validation={"num_samples": 10, "every_steps": 100})
    busy = changed(quiet, validation={"every_steps": 1}, grid={"every_steps": 1, "num_images": 2, "num_steps": 2})
    expected, found = (
        tensors(train(config, tmp_path / name)["checkpoint"]) for name, config in (("quiet", quiet), ("busy", busy))
    )
    assert all(torch.equal(found[key], values) for key, values in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(("denoiser", "side"), [(BASE, 16), pytest.param(SUPER, 32, marks=pytest.mark.slow)])
def test_grids_are_sampled_on_schedule(store: Path, tmp_path: Path, denoiser: dict[str, Any], side: int) -> None:
    config = make_config(
        store,
        num_steps=3,
        denoiser=denoiser,
        grid={"every_steps": 2, "num_images": 5, "num_steps": 2},
        precision="bfloat16",
    )
    train(config.model_copy(update={"batch_size": 2}), tmp_path)
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["step-00000002.png", "step-00000003.png"]
    with Image.open(tmp_path / "grids" / "step-00000003.png") as image:
        assert image.size == (3 * side + 4, 2 * side + 2)
        assert np.asarray(image)[:side, :side].std() > 1


@pytest.mark.parametrize("last", [1, 2, 3])
def test_nothing_is_written_once_the_check_raises(store: Path, tmp_path: Path, last: int) -> None:
    """At a step's end, before its checkpoint appears, and after its validation."""

    class LostError(Exception):
        pass

    def files() -> dict[str, bytes]:
        found = (path for path in tmp_path.rglob("*") if path.is_file() and ".tmp-" not in str(path))
        return {str(path): path.read_bytes() for path in found}

    calls, seen = itertools.count(1), {}

    def check() -> None:
        if next(calls) >= last:
            seen.update(files())
            raise LostError

    config = make_config(
        store, num_steps=2, checkpoints={"every_steps": 1}, validation={"num_samples": 4, "every_steps": 1}
    )
    with pytest.raises(LostError):
        train(config, tmp_path, check=check)
    assert files() == seen
    assert (tmp_path / "checkpoints/step-00000001").exists() == (last == 3)


def test_a_loss_that_is_not_finite_stops_before_the_step(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(store, num_steps=2), tmp_path)
    before = tensors(tmp_path / "checkpoints" / "step-00000002")

    def poisoned(*args: Any, **kwargs: Any) -> Example:
        example = make_example(*args, **kwargs)
        example.x0[1] = torch.inf
        return example

    monkeypatch.setattr(step_module, "make_example", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 2: loss nan, .*/nan/step-00000002.json. Resume from the last"):
        train(make_config(store, num_steps=5), tmp_path)
    saved = json.loads((tmp_path / "nan" / "step-00000002.json").read_text(encoding="utf-8"))
    assert (len(saved["keys"]), saved["step"], saved["loss"]) == (8, 2, "nan")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(step_module, "make_example", make_example)
    after = tensors(tmp_path / "checkpoints" / "step-00000002")
    assert all(torch.equal(after[key], values) for key, values in before.items())
    assert train(make_config(store, num_steps=5), tmp_path)["steps"] == 5


def test_a_gradient_that_is_not_finite_stops_too(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> torch.Tensor:
        losses = diffusion_loss(*args)
        losses.register_hook(lambda gradient: gradient * torch.nan)
        return losses

    monkeypatch.setattr(loss_module, "diffusion_loss", broken)
    with pytest.raises(NonFiniteLossError, match="gradient norm nan"):
        train(make_config(store), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_store_of_another_width_is_named(store: Path, tmp_path: Path) -> None:
    wider = BASE | {"unet": BASE_UNET | {"text_dim": 16}}
    with pytest.raises(TrainError, match=r"set denoiser\.unet\.text_dim=8"):
        train(make_config(store, denoiser=wider), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_importing_the_trainer_imports_no_framework_and_no_logger() -> None:
    code = (
        "import sys, imagen_core.train; "
        "names = {name.split('.')[0] for name in sys.modules}; "
        "print(sorted(names & {'ray', 'transformers', 'img2dataset', 'pipeline', 'stages', 'tensorboard', 'wandb'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_network_trains_alike_and_saves_the_same_names(store: Path, tmp_path: Path) -> None:
    tiny = BASE | {"unet": BASE_UNET | {"channel_mult": [1], "attention_resolutions": []}}
    config = make_config(store, num_steps=2, batch_size=4, precision="float32", denoiser=tiny)
    plain = tensors(train(config, tmp_path / "plain")["checkpoint"])
    compiled = tensors(train(changed(config, compute={"compile": True}), tmp_path / "compiled")["checkpoint"])
    assert compiled.keys() == plain.keys()
    for key, values in plain.items():
        if key.startswith("model/"):
            torch.testing.assert_close(compiled[key], values, rtol=0, atol=2e-3)  # two steps of Adam, rate below 1e-3


@pytest.mark.slow
def test_a_trace_of_the_chosen_steps_is_written(store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=4, logging={"profile_steps": (2, 3)}), tmp_path)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-2-3-rank-0.json"
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#DenseAdamW.step" for event in events) == 2
    with pytest.raises(ValueError, match=r"profile_steps: first and last step, from 1 \(got \[3, 2\]\)"):
        make_config(store, logging={"profile_steps": (3, 2)})
