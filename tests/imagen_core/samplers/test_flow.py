"""Sampling with flow matching: Gaussians, whose flow has a closed form, and diffusers' schedulers step by step."""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from imagen_core.diffusion.schedules import Flow
from imagen_core.diffusion.steps import Karras, Uniform
from imagen_core.samplers import (
    Ancestral,
    Ddim,
    DpmSolverPP2M,
    Euler,
    Heun,
    Inpaint,
    Plms,
    Prk,
    SeededNoise,
    encode,
    sample,
)
from imagen_core.samplers.loop import new_history
from tests.imagen_core.samplers.gaussian import Gaussian, law

SHAPE = (2, 3, 4, 4)
FLOWS = {
    "plain": Flow(),
    "shift": Flow(shift=3.0, t_min=0.01),
    "noise scale": Flow(noise_scale=2.0, t_min=0.01),
}
SAMPLERS = {
    "ancestral": (Ancestral(), 1000),
    "ddim": (Ddim(), 600),
    "euler": (Euler(), 600),
    "heun": (Heun(), 60),
    "heun churn": (Heun(churn=0.05), 60),
    "dpmpp_2m": (DpmSolverPP2M(), 200),
    "plms": (Plms(), 60),
    "prk": (Prk(), 20),
}


def build(name: str, **settings):
    """A scheduler of diffusers, which is imported where these tests run and not wherever they are collected."""
    return getattr(importlib.import_module("diffusers"), name)(**settings)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gaussian_is_reached_in_mean_and_variance(name, flow):
    sampler, num_steps = SAMPLERS[name]
    data, sigmas = Gaussian(), Uniform().sigmas(flow, num_steps)
    mean, covariance = law(sampler, data.denoise, sigmas, schedule=flow)
    assert float(mean) == pytest.approx(data.mean, rel=0.02)
    assert float(covariance) == pytest.approx(data.std**2, rel=0.02)


def final_error(sampler, num_steps, scale):
    """Distance to the exact flow after equal steps of t from 0.9 to 0.1."""
    data, flow = Gaussian(), Flow(noise_scale=scale)
    sigmas = flow.level(torch.linspace(0.9, 0.1, num_steps + 1, dtype=torch.float64))
    start = 3.0 * sigmas[0]
    x, history = start, new_history(flow, num_steps)
    for sigma, sigma_next in pairwise(sigmas):
        x = sampler.step(data.denoise, x, sigma, sigma_next, pytest.fail, history)
    return abs(float(x - data.flow(start, sigmas[0], sigmas[-1])))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("sampler", "order"), [(Euler(), 1), (Heun(), 2), (DpmSolverPP2M(), 2), (Plms(), 3), (Prk(), 4)], ids=repr
)
def test_the_error_falls_with_the_order_of_the_method(sampler, order, scale):
    few, many = (final_error(sampler, count, scale) for count in (160, 320))
    assert math.log2(few / many) > order - 0.1


def velocity(state: Tensor, t: Tensor) -> Tensor:
    """Stands for a trained network: not linear in x_t, and with a say at every t."""
    return torch.sin(2 * state) + t * torch.cos(state) - 0.4 * state


def ours(sampler, flow: Flow, grid: Uniform, num_steps: int, **options) -> tuple[Tensor, list[Tensor]]:
    """t of each level, and x_t after every step, in float32 from standard normal noise at t = 1."""
    sigmas, states = grid.sigmas(flow, num_steps), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        t, state = flow.t(sigma), x / (1 + sigma)
        return state - t * velocity(state, t)

    class Start:
        def __len__(self):
            return SHAPE[0]

        def normal(self, shape, device, dtype):
            return noise()

    def record(done, total, x):
        states.append(x / (1 + sigmas[done]).float())

    sample(
        sampler, denoise, sigmas, Start(), SHAPE[1:], start="unit_variance", schedule=flow, on_step=record, **options
    )
    return flow.t(sigmas).float(), states


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def lowest(shift: float) -> float:
    """Where diffusers' Euler and Heun end before 0: 1/1000, shifted when built and again when the steps are set."""
    return shifted(shifted(0.001, shift), shift)


def shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_of_flow_match_euler(shift):
    scheduler = build("FlowMatchEulerDiscreteScheduler", shift=shift)
    scheduler.set_timesteps(20)
    x, theirs = noise(), []
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[index]), timestep, x).prev_sample
        theirs.append(x)
    flow = Flow(shift=shift, t_min=lowest(shift), t_max=1 - 1e-6)
    for sampler in (Euler(), Ddim()):
        times, states = ours(sampler, flow, Uniform(), 20)
        torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=2e-6)
        assert_same(states, theirs)


def test_steps_of_flow_match_euler_at_given_sigmas():
    """Flux and its like give linspace(1, 1/n, n)."""
    scheduler = build("FlowMatchEulerDiscreteScheduler", shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 20, 20).tolist())
    x, theirs = noise(), []
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[index]), timestep, x).prev_sample
        theirs.append(x)
    times, states = ours(Euler(), Flow(shift=3.0, t_max=1 - 1e-6), Uniform(spacing="trailing"), 20)
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=2e-6)
    assert_same(states, theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_of_flow_match_heun(shift):
    scheduler = build("FlowMatchHeunDiscreteScheduler", shift=shift)
    scheduler.set_timesteps(20)
    x, theirs = noise(), []
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep / 1000), timestep, x).prev_sample
        theirs.append(x)
    flow = Flow(shift=shift, t_min=lowest(shift), t_max=1 - 1e-6)
    times, states = ours(Heun(), flow, Uniform(), 20)
    torch.testing.assert_close(times[:-1], torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]]) / 1000)
    assert_same(states, theirs[1::2] + theirs[-1:])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_of_dpm_solver_with_flow_sigmas(shift):
    scheduler = build(
        "DPMSolverMultistepScheduler",
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=shift,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
    )
    scheduler.set_timesteps(20)
    x, theirs = noise(), []
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[index]), timestep, x).prev_sample
        theirs.append(x)
    flow = Flow(shift=shift, t_max=shifted(0.999, shift))
    times, states = ours(DpmSolverPP2M(), flow, Uniform(spacing="trailing"), 20)
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=2e-6)
    assert_same(states, theirs)


@pytest.mark.parametrize("sampler", [Euler(), Ddim(), Heun(), DpmSolverPP2M(), Plms(), Prk()], ids=repr)
def test_float32_is_exact_from_nearly_infinite_noise(sampler):
    flow = Flow(t_max=1 - 1e-6)
    images = [
        sample(
            sampler,
            Gaussian().denoise,
            Uniform().sigmas(flow, 20),
            SeededNoise([0, 1]),
            SHAPE[1:],
            dtype=dtype,
            schedule=flow,
        ).double()
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("start", "size"), [("sigma", 2 * 0.9), ("unit_variance", 2.0)])
def test_sampling_starts_from_x_t_or_from_pure_noise(start, size):
    flow, states = Flow(noise_scale=2.0, t_max=0.9), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        states.append((1 - flow.t(sigma)) * x)
        return torch.zeros_like(x)

    sample(Euler(), denoise, Uniform().sigmas(flow, 3), SeededNoise([3]), (1, 2, 2), start=start, schedule=flow)
    torch.testing.assert_close(states[0], size * SeededNoise([3]).normal((1, 2, 2)))


def test_a_start_image_gets_the_noise_of_its_time():
    flow, states = Flow(noise_scale=2.0), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        states.append((flow.t(sigma), (1 - flow.t(sigma)) * x))
        return x

    image = torch.full((1, 1, 2, 2), 0.3)
    sigmas = Uniform().sigmas(flow, 10)
    sample(Euler(), denoise, sigmas, SeededNoise([3]), (1, 2, 2), init_image=image, strength=0.5, schedule=flow)
    t, state = states[0]
    assert float(t) == pytest.approx(float(flow.t(sigmas[5])))
    torch.testing.assert_close(state, (1 - t) * image + t * 2 * SeededNoise([3]).normal((1, 2, 2)))


@pytest.mark.parametrize("sampler", [Euler(), Heun(), DpmSolverPP2M()], ids=repr)
def test_an_image_comes_back_from_its_latent(sampler):
    flow, data = Flow(t_min=0.01, t_max=0.99), Gaussian()
    sigmas = Uniform().sigmas(flow, 200)
    image = data.mean + data.std * SeededNoise([1]).normal(SHAPE[1:], dtype=torch.float64)
    latent = encode(sampler, data.denoise, sigmas, image, schedule=flow)
    torch.testing.assert_close(latent, data.flow(image, sigmas[-2], sigmas[0]) / sigmas[0], rtol=0, atol=0.05)
    back = sample(
        sampler, data.denoise, sigmas, SeededNoise([0]), SHAPE[1:], dtype=torch.float64, latent=latent, schedule=flow
    )
    torch.testing.assert_close(back, image, rtol=0, atol=0.05)


@pytest.mark.parametrize("sampler", [Euler(), Heun(), DpmSolverPP2M(), Prk()], ids=repr)
def test_inpainting_keeps_its_part(sampler):
    flow, keep = Flow(), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    keep[..., :2] = True
    image = torch.full((1, 3, 4, 4), 0.9)
    result = sample(
        sampler,
        Gaussian().denoise,
        Uniform().sigmas(flow, 10),
        SeededNoise([0]),
        SHAPE[1:],
        inpaint=Inpaint(image, keep, resample_times=2),
        schedule=flow,
    )
    assert torch.equal(result[..., :2], image[..., :2])
    assert bool(result.isfinite().all())
    assert float(result[..., 2:].abs().max()) < 3


def test_the_middle_of_two_levels_is_that_of_their_times():
    flow = Flow(mean=-3.0, std=0.1, noise_scale=2.0)
    levels = flow.level(torch.tensor([0.9999, 0.1], dtype=torch.float64))
    assert float(flow.t(new_history(flow, 1).middle(levels[0], levels[1]))) == pytest.approx((0.9999 + 0.1) / 2)


def test_the_default_grid_suits_a_flow_too():
    data, flow = Gaussian(), Flow(noise_scale=2.0, t_min=0.002)
    sigmas = Karras().sigmas(flow, 80)
    assert float(sigmas[0]) == pytest.approx(160)
    mean, covariance = law(DpmSolverPP2M(), data.denoise, sigmas, schedule=flow)
    assert float(mean) == pytest.approx(data.mean, rel=0.02)
    assert float(covariance) == pytest.approx(data.std**2, rel=0.02)
