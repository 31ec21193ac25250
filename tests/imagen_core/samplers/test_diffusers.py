"""Each sampler takes the same steps as diffusers' scheduler of the same name, to 1e-4.

diffusers works on x_vp = alpha x (its DDPM family) or on x itself (its Euler and EDM family), in float32. Both are
given one network, which stands for a trained one: not linear in x, and with a say at every noise level.
"""

import importlib
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_core.diffusion import DiffusionConfig, GuidedDenoiser
from imagen_core.diffusion.precondition import coefficients
from imagen_core.diffusion.schedules import Discrete, LogNormal
from imagen_core.diffusion.steps import Karras, Uniform
from imagen_core.samplers import Ancestral, Ddim, DpmSolverPP2M, Euler, Heun, History, Plms, Prk, sample

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
SHAPE = (2, 3, 4, 4)


def build(name: str, **settings):
    """A scheduler of diffusers, which is imported where these tests run and not wherever they are collected."""
    return getattr(importlib.import_module("diffusers"), name)(**settings)


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(x / sigma**2) + 0.3 * sigma * torch.sin(2 * x / (1 + sigma**2).sqrt())


def our_steps(sampler, x: Tensor, sigmas: Tensor) -> list[Tensor]:
    """The state x = x0 + sigma n after every step."""
    generator, history, states = torch.Generator().manual_seed(1), History(), []
    for sigma, sigma_next in pairwise(sigmas):
        x = sampler.step(denoise, x, sigma, sigma_next, lambda: torch.randn(SHAPE, generator=generator), history)
        states.append(x)
    return states


def start(sigma: float) -> Tensor:
    return sigma * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def assert_same(ours: list[Tensor], theirs: list[Tensor], sigmas: Tensor) -> None:
    """Compared as the network would see them, so that high noise levels do not hide or inflate a difference."""
    assert len(ours) == len(theirs)
    for mine, other, sigma in zip(ours, theirs, sigmas[1:], strict=True):
        alpha = 1 / (1 + sigma**2).sqrt()
        torch.testing.assert_close(alpha * mine, alpha * other, rtol=0, atol=1e-4)


def vp_steps(scheduler, **options) -> tuple[Tensor, list[Tensor]]:
    """The sigmas of a scheduler of the DDPM family, and its states x_vp / alpha after every call."""
    kept = scheduler.alphas_cumprod.double()
    level = ((1 - kept) / kept).sqrt().float()
    x = start(float(level[scheduler.timesteps[0]])) / (1 + level[scheduler.timesteps[0]] ** 2).sqrt()
    generator, states = torch.Generator().manual_seed(1), []
    if options.pop("adds_noise", False):
        options["generator"] = generator
    for timestep in scheduler.timesteps:
        sigma = level[timestep]
        alpha = 1 / (1 + sigma**2).sqrt()
        noise = (x / alpha - denoise(x / alpha, sigma)) / sigma
        x = scheduler.step(noise, timestep, x, **options).prev_sample
        states.append(x)
    return level, states


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        (
            Ancestral(),
            partial(build, "DDPMScheduler", **LINEAR, variance_type="fixed_small", clip_sample=False),
            {"adds_noise": True},
        ),
        (
            Ancestral(variance="fixed_large"),
            partial(build, "DDPMScheduler", **LINEAR, variance_type="fixed_large", clip_sample=False),
            {"adds_noise": True},
        ),
        (Ddim(), partial(build, "DDIMScheduler", **LINEAR, clip_sample=False), {}),
        (
            Ddim(eta=0.5),
            partial(build, "DDIMScheduler", **LINEAR, clip_sample=False),
            {"eta": 0.5, "adds_noise": True},
        ),
        (
            Ddim(eta=1.0),
            partial(build, "DDIMScheduler", **LINEAR, clip_sample=False),
            {"eta": 1.0, "adds_noise": True},
        ),
        (Plms(), partial(build, "PNDMScheduler", **LINEAR, skip_prk_steps=True, set_alpha_to_one=True), {}),
    ],
    ids=["ddpm", "ddpm fixed_large", "ddim eta 0", "ddim eta 0.5", "ddim eta 1", "plms"],
)
def test_steps_of_the_ddpm_family(sampler, scheduler, options):
    scheduler = scheduler()
    scheduler.set_timesteps(20)
    level, states = vp_steps(scheduler, **options)
    visited = torch.tensor(sorted({int(step) for step in scheduler.timesteps}, reverse=True))
    sigmas = torch.cat([level[visited], torch.zeros(1)])
    if isinstance(sampler, Plms):  # its first step is two calls
        states = states[1:]
    theirs = [state * (1 + sigma**2).sqrt() for state, sigma in zip(states, sigmas[1:], strict=True)]
    assert_same(our_steps(sampler, start(float(sigmas[0])), sigmas), theirs, sigmas)


def test_steps_of_ddpm_with_a_learned_range():
    """On 20 of the 1000 steps, as in iDDPM's respaced sampling."""
    scheduler = build("DDPMScheduler", **LINEAR, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(20)

    def says(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / (1 + sigma**2).sqrt())

    settings = DiffusionConfig(schedule=Discrete(), variance="learned_range")
    model = GuidedDenoiser(lambda x, sigma: (denoise(x, sigma), says(x, sigma)), settings)
    sigmas = torch.cat([Discrete().sigmas()[scheduler.timesteps].float(), torch.zeros(1)])
    ours = x = start(float(sigmas[0]))
    alpha = 1 / (1 + sigmas**2).sqrt()
    theirs = alpha[0] * x
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for index, timestep in enumerate(scheduler.timesteps):
        sigma, sigma_next = sigmas[index], sigmas[index + 1]
        ours = Ancestral().step(
            model, ours, sigma, sigma_next, lambda: torch.randn(SHAPE, generator=generators[0]), History()
        )
        state = theirs / alpha[index]
        output = torch.cat([(state - denoise(state, sigma)) / sigma, says(state, sigma)], dim=1)
        theirs = scheduler.step(output, timestep, theirs, generator=generators[1]).prev_sample
        torch.testing.assert_close(alpha[index + 1] * ours, theirs, rtol=0, atol=1e-4)


def test_steps_of_pseudo_runge_kutta_followed_by_plms():
    scheduler = build("PNDMScheduler", **LINEAR, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    _, states = vp_steps(scheduler)
    sigmas = torch.cat([Discrete().sigmas()[torch.arange(950, -1, -50)], torch.zeros(1, dtype=torch.float64)])
    states = states[3:12:4] + states[12:]  # four calls in each of the first three steps
    theirs = [state * (1 + sigma**2).sqrt() for state, sigma in zip(states, sigmas[1:], strict=True)]
    ours = []

    class Start:
        def __len__(self):
            return SHAPE[0]

        def normal(self, *_):
            return start(1.0)

    sample(
        Prk(num_steps=3),
        denoise,
        sigmas,
        Start(),
        SHAPE[1:],
        schedule=Discrete(),
        on_step=lambda done, total, x: ours.append(x),
    )
    assert_same(ours, theirs, sigmas)


def test_without_a_schedule_pseudo_runge_kutta_takes_the_middle_in_sigma():
    sigma = 0.05 + 0.1 * np.arange(41)  # linear in the step: their midpoint in time is ours in sigma
    kept = 1 / (1 + sigma**2)
    betas = 1 - kept / np.concatenate([[1], kept[:-1]])
    scheduler = build("PNDMScheduler", num_train_timesteps=41, trained_betas=betas, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    level, states = vp_steps(scheduler)
    visited = torch.arange(36, -1, -4)
    sigmas = torch.cat([level[visited], torch.zeros(1)])
    states = states[3:12:4] + states[12:]  # four calls in each of the first three steps
    theirs = [state * (1 + sigma**2).sqrt() for state, sigma in zip(states, sigmas[1:], strict=True)]
    assert_same(our_steps(Prk(num_steps=3), start(float(sigmas[0])), sigmas), theirs, sigmas)


def ve_steps(scheduler, *, edm: bool, **options) -> list[Tensor]:
    """States x of a scheduler of the Euler or EDM family after every call.

    With churn the scheduler raises the noise inside `step`, after the network was called. Algorithm 2 of the paper
    calls it on the raised state, so that state is made here first, from the same random numbers.
    """
    x, states = start(float(scheduler.sigmas[0])), []
    generator = torch.Generator().manual_seed(1)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        sigma = scheduler.sigmas[scheduler.step_index]
        raised, level = x, sigma
        if options and options["s_tmin"] <= sigma <= options["s_tmax"]:
            level = sigma * (1 + options["s_churn"] / 20)
            same = torch.Generator().manual_seed(0)
            same.set_state(generator.get_state())
            raised = x + (level**2 - sigma**2).sqrt() * options["s_noise"] * torch.randn(SHAPE, generator=same)
        output = (raised - denoise(raised, level)) / level
        if edm:
            c = coefficients("edm", level, 0.5)
            output = (denoise(raised, level) - c.skip * raised) / c.out
        x = scheduler.step(output, timestep, x, generator=generator, **options).prev_sample
        states.append(x)
    return states


CHURN = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
CHURNED = {"churn": 4.0 / 20, "churn_sigma_min": 0.05, "churn_sigma_max": 50.0, "churn_noise": 1.003}


@pytest.mark.parametrize(
    ("sampler", "scheduler", "edm", "options"),
    [
        (Euler(), partial(build, "EulerDiscreteScheduler", **LINEAR), False, {}),
        (Euler(**CHURNED), partial(build, "EulerDiscreteScheduler", **LINEAR), False, CHURN),
        (Ancestral(), partial(build, "EulerAncestralDiscreteScheduler", **LINEAR), False, {}),
        (Euler(), partial(build, "EDMEulerScheduler", **EDM), True, {}),
        (Euler(**CHURNED), partial(build, "EDMEulerScheduler", **EDM), True, CHURN),
    ],
    ids=["euler", "euler churn", "euler ancestral", "edm euler", "edm euler churn"],
)
def test_steps_of_the_euler_family(sampler, scheduler, edm, options):
    scheduler = scheduler()
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.clone()
    assert_same(our_steps(sampler, start(float(sigmas[0])), sigmas), ve_steps(scheduler, edm=edm, **options), sigmas)


def test_steps_of_heun():
    scheduler = build("HeunDiscreteScheduler", **LINEAR)
    scheduler.set_timesteps(20)
    x, theirs = start(float(scheduler.sigmas[0])), []
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        sigma = scheduler.sigmas[scheduler.step_index]
        x = scheduler.step((x - denoise(x, sigma)) / sigma, timestep, x).prev_sample
        theirs.append(x)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])  # each but the ends is there twice
    assert_same(our_steps(Heun(), start(float(sigmas[0])), sigmas), theirs[1::2] + theirs[-1:], sigmas)


def test_steps_of_dpm_solver_pp_2m():
    scheduler = build(
        "DPMSolverMultistepScheduler", **LINEAR, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"
    )
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.clone()
    x, theirs = start(float(sigmas[0])) / (1 + sigmas[0] ** 2).sqrt(), []
    for index, timestep in enumerate(scheduler.timesteps):
        scale = (1 + sigmas[index] ** 2).sqrt()
        noise = (x * scale - denoise(x * scale, sigmas[index])) / sigmas[index]
        x = scheduler.step(noise, timestep, x).prev_sample
        theirs.append(x * (1 + sigmas[index + 1] ** 2).sqrt())
    assert_same(our_steps(DpmSolverPP2M(), start(float(sigmas[0])), sigmas), theirs, sigmas)


def test_steps_of_edm_dpm_solver_pp_2m():
    scheduler = build("EDMDPMSolverMultistepScheduler", **EDM, solver_order=2, solver_type="midpoint")
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.clone()
    assert_same(our_steps(DpmSolverPP2M(), start(float(sigmas[0])), sigmas), ve_steps(scheduler, edm=True), sigmas)


def test_grid_of_karras():
    scheduler = build("EDMEulerScheduler", **EDM)
    scheduler.set_timesteps(20)
    torch.testing.assert_close(Karras().sigmas(LogNormal(), 20).float(), scheduler.sigmas, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_tables_of_discrete_schedules(ours, theirs):
    scheduler = build("DDPMScheduler", **LINEAR | {"beta_schedule": theirs})
    kept = 1 / (1 + Discrete(beta=ours).sigmas() ** 2)
    torch.testing.assert_close(kept.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "skips"), [("DDPMScheduler", False), ("DPMSolverMultistepScheduler", True)])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 3, 7, 27, 100])
def test_steps_that_spacings_take(name, skips, spacing, num_steps):
    scheduler = build(name, **LINEAR, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    grid = Uniform(spacing=spacing, skip_lowest=skips and spacing != "trailing")
    if (spacing, num_steps, skips) == ("linspace", 1, False):  # diffusers takes step 0: one step that changes nothing
        assert scheduler.timesteps.tolist() == [0]
        return
    sigmas = Discrete().sigmas()[scheduler.timesteps]
    assert grid.sigmas(Discrete(), num_steps)[:-1].tolist() == sigmas.tolist()
