"""Which noise levels training visits, what their losses count, and what of it a checkpoint keeps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion import Denoiser
from imagen_core.train import load_checkpoint, train
from imagen_core.train.data.example import make_example
from imagen_core.train.data.noise_levels import NoiseLevelSampler
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import BatchStream
from imagen_core.train.parallel.world import World
from tests.imagen_core.train.small import BASE, files, make_config, tensors

DISCRETE, TINY = (
    BASE | {"diffusion": {"schedule": {"kind": "discrete", "num_steps": n, "beta": "cosine"}, "objective": "eps"}}
    for n in (20, 2)
)
EVEN = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def sampler(**changes: Any) -> NoiseLevelSampler:
    return NoiseLevelSampler(make_config(Path("store"), **{"denoiser": DISCRETE} | changes))


def filled(losses: np.ndarray) -> NoiseLevelSampler:
    """A sampler with these losses (steps, n), the last ones newest."""
    times = sampler(noise_levels={"kind": "loss_second_moment"})
    for column in losses.T:
        times.record([(step, float(loss)) for step, loss in enumerate(column)])
    return times


def test_uniform_times_are_what_they_were() -> None:
    time, weight = sampler().choose(EVEN)
    assert torch.equal(time, EVEN)
    assert torch.equal(weight, torch.ones_like(EVEN))


def test_early_times_are_those_with_the_least_noise() -> None:
    times = sampler(noise_levels={"kind": "early_only", "early_fraction": 0.25})
    time, weight = times.choose(EVEN)
    steps = times.steps(make_config(Path("s"), denoiser=DISCRETE).denoiser.diffusion.schedule.sigma(time))
    assert torch.bincount(steps.long(), minlength=20).tolist() == [20_000] * 5 + [0] * 15
    assert torch.equal(weight, torch.ones_like(EVEN))


def test_until_every_step_has_ten_losses_all_are_sampled_equally() -> None:
    times = sampler(noise_levels={"kind": "loss_second_moment"})
    for count in range(10):
        assert torch.equal(times.probabilities(), torch.full((20,), 0.05, dtype=torch.float64))
        times.record([(step, 1.0 + step) for step in range(20 if count < 9 else 19)])
    assert torch.equal(times.probabilities(), torch.full((20,), 0.05, dtype=torch.float64))
    times.record([(19, 20.0)])
    assert not torch.equal(times.probabilities(), torch.full((20,), 0.05, dtype=torch.float64))


def test_steps_are_sampled_by_the_root_of_the_second_moment_of_their_last_ten_losses() -> None:
    losses = np.random.default_rng(0).uniform(0.1, 3, (20, 17))
    moments = np.sqrt((losses[:, -10:] ** 2).mean(axis=1))
    expected = 0.999 * moments / moments.sum() + 0.001 / 20
    times = filled(losses)
    np.testing.assert_allclose(times.probabilities(), expected, rtol=1e-12)
    time, weight = times.choose(EVEN)
    steps = (time * 20).floor().long()
    np.testing.assert_allclose(torch.bincount(steps, minlength=20) / len(EVEN), expected, atol=2e-5)
    np.testing.assert_allclose(weight, 1 / (20 * expected[steps]), rtol=1e-12)


def test_weights_leave_the_mean_loss_what_it_is_with_uniform_times() -> None:
    losses = np.random.default_rng(0).uniform(0.1, 3, (20, 10))
    of_step = torch.linspace(1, 9, 20, dtype=torch.float64)
    time, weight = filled(losses).choose(EVEN)
    mean = (weight * of_step[(time * 20).floor().long()]).mean()
    assert float(mean) == pytest.approx(float(of_step.mean()), rel=1e-3)


def test_an_example_has_the_level_of_its_time_and_its_weight(store: Path) -> None:
    config = make_config(store, denoiser=DISCRETE, noise_levels={"kind": "loss_second_moment"})
    times = filled(np.arange(1.0, 21)[:, None].repeat(10, axis=1))
    stream = BatchStream(open_stores(config), config, World(0, 1, torch.device("cpu")), None)
    batch = stream.next()
    stream.close()
    denoiser = config.denoiser
    arguments = (batch, config, Denoiser(denoiser), torch.device("cpu"), 0)
    plain, chosen = make_example(*arguments), make_example(*arguments, times)
    steps = times.steps(chosen.sigma).long()
    torch.testing.assert_close(chosen.weight, 1 / (20 * times.probabilities()[steps]))
    torch.testing.assert_close(denoiser.diffusion.schedule.sigmas()[steps], chosen.sigma)
    assert float(times.steps(chosen.sigma).mean()) > float(times.steps(plain.sigma).mean())
    assert torch.equal(plain.noise, chosen.noise)
    assert torch.equal(plain.weight, torch.ones_like(plain.weight))


@pytest.mark.slow
def test_losses_are_part_of_a_checkpoint_and_resume_is_exact(store: Path, tmp_path: Path) -> None:
    """Two steps have their ten losses after three batches of eight, so from then on weights matter."""
    changes = {"denoiser": TINY, "noise_levels": {"kind": "loss_second_moment"}, "micro_batch_size": 3}
    straight = train(make_config(store, num_steps=5, **changes), tmp_path / "a")
    train(make_config(store, num_steps=4, **changes), tmp_path / "b")
    resumed = train(make_config(store, num_steps=5, **changes), tmp_path / "b")
    assert files(resumed["checkpoint"]) == files(straight["checkpoint"])
    kept = tensors(straight["checkpoint"])
    assert kept["noise_levels/counts"].tolist() == [10, 10]
    assert bool((kept["noise_levels/losses"] > 0).all())
    assert load_checkpoint(tmp_path / "a").weights == "ema-0.9"
    uniform = train(make_config(store, num_steps=5, **changes | {"noise_levels": {"kind": "uniform"}}), tmp_path / "c")
    assert "noise_levels.safetensors" not in files(uniform["checkpoint"])
    weight = "model/net.conv_in.weight"
    assert not torch.equal(tensors(uniform["checkpoint"])[weight], kept[weight])


@pytest.mark.slow
def test_the_kind_of_noise_levels_may_change_when_a_run_resumes(store: Path, tmp_path: Path) -> None:
    train(make_config(store, num_steps=2, denoiser=DISCRETE), tmp_path)
    later = train(
        make_config(store, num_steps=3, denoiser=DISCRETE, noise_levels={"kind": "loss_second_moment"}), tmp_path
    )
    assert int(tensors(later["checkpoint"])["noise_levels/counts"].sum()) == 8
    again = train(make_config(store, num_steps=4, denoiser=DISCRETE, noise_levels={"kind": "early_only"}), tmp_path)
    assert again["steps"] == 4


def test_loss_second_moment_needs_discrete_steps() -> None:
    with pytest.raises(
        ValidationError, match=r"noise_levels\.kind=loss_second_moment needs a discrete schedule \(got log_normal\)"
    ):
        make_config(Path("store"), noise_levels={"kind": "loss_second_moment"})
