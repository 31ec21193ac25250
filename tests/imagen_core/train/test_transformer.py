"""Trainings of the patch transformer: every objective, exact resume, buckets, memory, compilation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.diffusion import DenoiserConfig
from imagen_core.train import TrainingStopped, load_checkpoint, train
from imagen_core.train.memory import MemoryEstimate, estimate_memory
from tests.imagen_core.models.count import count_parameters
from tests.imagen_core.models.small import inputs, transformer
from tests.imagen_core.train.small import (
    TRANSFORMER,
    TRANSFORMER_SUPER,
    TRANSFORMER_UNET,
    changed,
    make_config,
    make_store,
    metrics,
    tensors,
)

DISCRETE = {"kind": "discrete"}
KINDS: dict[str, dict[str, Any]] = {
    "edm": {"denoiser": TRANSFORMER},
    "eps": {"denoiser": TRANSFORMER | {"diffusion": {"schedule": DISCRETE, "objective": "eps", "weight": "p2"}}},
    "x0": {"denoiser": TRANSFORMER | {"diffusion": {"schedule": {"kind": "log_snr_cosine"}, "objective": "x0"}}},
    "v": {"denoiser": TRANSFORMER | {"diffusion": {"schedule": {"kind": "log_snr_cosine"}, "objective": "v"}}},
    "learned_variance": {
        "denoiser": TRANSFORMER
        | {
            "unet": TRANSFORMER_UNET | {"out_channels": 6},
            "diffusion": {"schedule": DISCRETE, "objective": "eps", "variance": "learned_range"},
        }
    },
    "super": {"denoiser": TRANSFORMER_SUPER, "views": {"crop_px": 16, "horizontal_flip": True}},
    "without_text": {
        "denoiser": TRANSFORMER | {"unet": TRANSFORMER_UNET | {"text_dim": None, "attention_type": "self"}},
        "text": None,
    },
    "self_conditioning": {"denoiser": TRANSFORMER | {"unet": TRANSFORMER_UNET | {"self_conditioning": True}}},
    "dropout": {"denoiser": TRANSFORMER | {"unet": TRANSFORMER_UNET | {"dropout": 0.3}}},
    "bfloat16": {"denoiser": TRANSFORMER, "precision": "bfloat16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_objective_trains_and_resumes_bit_for_bit(store: Path, tmp_path: Path, kind: str) -> None:
    config = make_config(store, **{"num_steps": 3, "batch_size": 4, **KINDS[kind]})
    straight = train(config, tmp_path / "a")
    assert 0 < straight["loss"] < 10
    train(config.model_copy(update={"num_steps": 1}), tmp_path / "b")
    torch.manual_seed(123)
    resumed = train(config, tmp_path / "b")
    expected, found = tensors(straight["checkpoint"]), tensors(resumed["checkpoint"])
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], values) for key, values in expected.items())
    assert load_checkpoint(tmp_path / "b").denoiser.config == config.denoiser


@pytest.mark.slow
@pytest.mark.parametrize("time", ["adaptive", "shared", "token"])
def test_the_loss_falls_in_20_steps(store: Path, tmp_path: Path, time: str) -> None:
    config = make_config(
        store,
        num_steps=20,
        denoiser=TRANSFORMER | {"unet": TRANSFORMER_UNET | {"time": time}},
        precision="float32",
        optimizer={"lr": 5e-3, "warmup_steps": 2},
        validation={"num_samples": 16, "every_steps": 5},
    )
    train(config, tmp_path)
    losses = [line["validation_loss_without_ema"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.003  # the images are noise, so that little can be learned


@pytest.mark.slow
def test_a_training_on_buckets_resumes_bit_for_bit(tmp_path: Path) -> None:
    bucketed = make_store(tmp_path / "store", rows=(9, 6), buckets=True)
    config = make_config(
        bucketed,
        denoiser=TRANSFORMER_SUPER,
        batch_size=3,
        validation={"num_samples": 3, "every_steps": 6},
        grid={"every_steps": 6, "num_images": 4, "num_steps": 2},
    )
    whole = train(config, tmp_path / "whole")
    calls = iter([False, False, True])
    with pytest.raises(TrainingStopped):
        train(config, tmp_path / "parts", should_stop=lambda: next(calls))
    parts = train(config, tmp_path / "parts")
    first, second = tensors(whole["checkpoint"]), tensors(parts["checkpoint"])
    assert all(torch.equal(values, second[name]) for name, values in first.items())
    assert whole["validation_loss"] == parts["validation_loss"]
    assert (tmp_path / "parts" / "grids" / "step-00000006.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_network_trains_alike_and_saves_the_same_names(store: Path, tmp_path: Path) -> None:
    tiny = TRANSFORMER | {"unet": TRANSFORMER_UNET | {"depth": 1}}
    config = make_config(store, num_steps=2, batch_size=4, precision="float32", denoiser=tiny)
    plain = tensors(train(config, tmp_path / "plain")["checkpoint"])
    compiled = tensors(train(changed(config, compute={"compile": True}), tmp_path / "compiled")["checkpoint"])
    assert compiled.keys() == plain.keys()
    for key, values in plain.items():
        if key.startswith("model/"):
            torch.testing.assert_close(compiled[key], values, rtol=0, atol=2e-3)  # two steps of Adam, rate below 1e-3


def estimate(batch: int = 1, **changes: object) -> MemoryEstimate:
    config = DenoiserConfig(unet=transformer(**changes), size_px=16)
    settings = {"num_tokens": 6, "bytes_per_activation": 4, "num_averages": 2, "num_shards": 1}
    return estimate_memory(config, micro_batch_size=batch, shape=(16, 16), **settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_estimate_of_memory_is_what_autograd_keeps() -> None:
    config = transformer()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = config.build()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x, c_noise, conditioning = inputs(config, lengths=(6,))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = model(x, c_noise, conditioning)
    real = sum(count for place, count in kept.items() if place not in weights)
    assert result.shape == x.shape
    found = estimate()
    assert found.activations == pytest.approx(real, rel=0.15)  # the attention matrix is not counted
    assert found.weights == found.gradients == 4 * count_parameters(config)
    assert estimate(batch=5).activations == pytest.approx(5 * found.activations, rel=0.1)
    assert estimate(activation_checkpointing=True).activations < 0.5 * found.activations
