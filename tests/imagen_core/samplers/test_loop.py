"""What holds for every sampler: step counts, dtypes, start images, thresholds, and batches."""

from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter

from imagen_core.diffusion import DiffusionConfig, Guidance, GuidedDenoiser, Threshold, guided
from imagen_core.diffusion.schedules import Discrete, LogNormal
from imagen_core.diffusion.steps import Karras, Uniform
from imagen_core.models import Conditioning
from imagen_core.samplers import Ancestral, Ddim, DpmSolverPP2M, Euler, Heun, History, Plms, Prk, SeededNoise, sample
from imagen_core.samplers.registry import AnySampler
from tests.imagen_core.diffusion.small import small_denoiser, with_random_weights
from tests.imagen_core.samplers.gaussian import Gaussian

SAMPLERS = [
    Ancestral(),
    Ddim(),
    Ddim(eta=0.5),
    Euler(),
    Euler(churn=0.3),
    Heun(),
    Heun(churn=0.3),
    DpmSolverPP2M(),
    Plms(),
    Prk(),
    Prk(num_steps=2),
]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
SHAPE = (1, 2, 2)


@every_sampler
def test_one_step_is_the_denoised_image(sampler):
    sampler = sampler.model_copy(update={"churn": 0.0}) if isinstance(sampler, Euler) else sampler
    sigmas = Karras().sigmas(LogNormal(), 1)
    noise = SeededNoise([4]).normal(SHAPE, dtype=torch.float64)
    expected = Gaussian().denoise(80.0 * noise, torch.tensor(80.0, dtype=torch.float64))
    generated = sample(sampler, Gaussian().denoise, sigmas, SeededNoise([4]), SHAPE, dtype=torch.float64)
    torch.testing.assert_close(generated, expected)


@every_sampler
def test_any_number_of_steps_generates_finite_images(sampler):
    for num_steps in (2, 3, 4, 5, 17):
        sigmas = Karras().sigmas(LogNormal(), num_steps)
        generated = sample(sampler, Gaussian().denoise, sigmas, SeededNoise(range(4)), SHAPE)
        assert generated.dtype == torch.float32
        assert generated.shape == (4, *SHAPE)
        assert bool(generated.isfinite().all())
    assert float((generated - 0.5).abs().max()) < 4 * 0.4


@every_sampler
def test_float32_agrees_with_float64(sampler):
    sigmas, data = Karras().sigmas(LogNormal(), 12), Gaussian()
    single, double = (
        sample(sampler, data.denoise, sigmas, SeededNoise([1]), SHAPE, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5)


@every_sampler
def test_more_steps_than_a_discrete_schedule_has_are_refused_with_both_numbers(sampler):
    with pytest.raises(ValueError, match=r"101 steps.*schedule of 100 steps"):
        sample(sampler, Gaussian().denoise, Uniform().sigmas(Discrete(num_steps=100), 101), SeededNoise([0]), SHAPE)


@every_sampler
@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (Threshold(kind="none"), [3.0, -0.5]),
        (Threshold(kind="static"), [1.0, -0.5]),
        (Threshold(kind="dynamic", percentile=1.0), [1.0, -0.5 / 3]),
        (Threshold(kind="dynamic", percentile=1.0, cap=1.5), [1.0, -0.5 / 1.5]),
    ],
    ids=lambda value: repr(value) if isinstance(value, Threshold) else "",
)
def test_the_configured_threshold_is_the_one_used(sampler, threshold, expected):
    """One published EDM sampler replaced whatever it was given by dynamic thresholding."""
    image = torch.tensor([3.0, -0.5], dtype=torch.float64).reshape(1, 1, 1, 2)
    generated = sample(
        sampler,
        lambda x, sigma: threshold(image.expand_as(x)),
        Karras().sigmas(LogNormal(), 4),
        SeededNoise([0]),
        (1, 1, 2),
        dtype=torch.float64,
    )
    torch.testing.assert_close(generated.flatten(), torch.tensor(expected, dtype=torch.float64))


@every_sampler
def test_an_image_does_not_depend_on_its_batch(sampler):
    def generate(seeds):
        sigmas = Karras().sigmas(LogNormal(), 6)
        return sample(sampler, Gaussian().denoise, sigmas, SeededNoise(seeds), SHAPE, dtype=torch.float64)

    batch = generate([11, 12, 13, 14, 15])
    torch.testing.assert_close(generate([13]), batch[2:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(generate([15, 13]), batch[[4, 2]], rtol=0, atol=1e-12)
    assert float((batch[1] - batch[2]).abs().max()) > 0.1


def test_an_image_of_a_network_with_guidance_and_dynamic_thresholding_does_not_depend_on_its_batch():
    denoiser = with_random_weights(small_denoiser(), seed=0).double()
    text = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeds = [11, 12, 13, 14, 15]

    def generate(rows):
        conditioning = Conditioning(text=text[rows], text_mask=torch.ones(len(rows), 3, dtype=torch.bool))
        denoise = guided(denoiser, conditioning, Guidance(text=3.0), Threshold(kind="dynamic", percentile=0.9))
        noise = SeededNoise([seeds[row] for row in rows])
        grid = Karras().sigmas(LogNormal(), 3)
        return sample(Ancestral(), denoise, grid, noise, (3, 8, 8), dtype=torch.float64)

    batch, alone, mixed = generate([0, 1, 2, 3, 4]), generate([2]), generate([4, 2])
    torch.testing.assert_close(alone[0], batch[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed, batch[[4, 2]], rtol=0, atol=1e-6)
    assert float((batch[1] - batch[2]).abs().max()) > 0.1


@every_sampler
def test_strength_0_returns_the_image_and_strength_1_ignores_it(sampler):
    image = torch.rand(2, *SHAPE, dtype=torch.float64) * 2 - 1
    sigmas = Karras().sigmas(LogNormal(), 8)

    def generate(**options):
        noise = SeededNoise([1, 2])
        return sample(sampler, Gaussian().denoise, sigmas, noise, SHAPE, dtype=torch.float64, **options)

    assert torch.equal(generate(init_image=image, strength=0), image)
    assert torch.equal(generate(init_image=image, strength=1), generate())


def test_a_start_image_is_kept_as_far_as_the_exact_flow_keeps_it():
    data, image, noise = Gaussian(), torch.full((1, 1, 1, 1), 0.9, dtype=torch.float64), SeededNoise([3])
    sigmas = Karras().sigmas(LogNormal(), 200)
    first = sigmas[100]
    start = image + first * SeededNoise([3]).normal((1, 1, 1), dtype=torch.float64)
    expected = data.flow(start, first, torch.zeros((), dtype=torch.float64))
    generated = sample(
        Heun(), data.denoise, sigmas, noise, (1, 1, 1), dtype=torch.float64, init_image=image, strength=0.5
    )
    torch.testing.assert_close(generated, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=str(strength)):
        sample(
            Euler(),
            Gaussian().denoise,
            Karras().sigmas(LogNormal(), 4),
            SeededNoise([0]),
            SHAPE,
            init_image=torch.zeros(1, *SHAPE),
            strength=strength,
        )


@pytest.mark.parametrize("sigmas", [[0.0], [1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [2.0, 1.0]])
def test_a_grid_that_does_not_fall_to_zero_is_refused(sigmas):
    with pytest.raises(ValueError, match="must fall strictly and end with 0"):
        sample(Euler(), Gaussian().denoise, torch.tensor(sigmas), SeededNoise([0]), SHAPE)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 8), (0.5, 4)])
def test_the_callback_sees_every_step(strength, steps):
    seen = []
    result = sample(
        DpmSolverPP2M(),
        Gaussian().denoise,
        Karras().sigmas(LogNormal(), 8),
        SeededNoise([0]),
        SHAPE,
        init_image=torch.zeros(1, *SHAPE),
        strength=strength,
        on_step=lambda done, total, x: seen.append((done, total, x)),
    )
    assert [(done, total) for done, total, _ in seen] == [(k + 1, steps) for k in range(steps)]
    assert torch.equal(seen[-1][2], result)


def test_network_calls_are_those_of_the_method():
    def calls(sampler, num_steps=10):
        count = 0

        def denoise(x, sigma):
            nonlocal count
            count += 1
            return torch.zeros_like(x)

        sample(sampler, denoise, Karras().sigmas(LogNormal(), num_steps), SeededNoise([0]), SHAPE)
        return count

    single = [Ancestral(), Ddim(), Euler(), DpmSolverPP2M()]
    assert [calls(sampler) for sampler in single] == [10, 10, 10, 10]
    assert calls(Heun()) == 2 * 9 + 1
    assert calls(Plms()) == 11
    assert calls(Prk()) == 4 * 9 + 1
    assert calls(Prk(num_steps=3)) == 3 * 4 + 7


@every_sampler
def test_configs_are_read_by_kind(sampler):
    assert TypeAdapter(AnySampler).validate_python(sampler.model_dump()) == sampler


def test_pseudo_runge_kutta_keeps_four_slopes_only():
    history, x = History(), torch.ones(1, 1, 1, 1)
    sigmas = Karras().sigmas(LogNormal(), 30)
    for sigma, sigma_next in pairwise(sigmas):
        x = Prk().step(Gaussian().denoise, x, sigma, sigma_next, pytest.fail, history)
    assert len(history.derivatives) == 4


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (Plms(), [2, 1, 1, 1, 1, 1, 1, 1]),
        (Plms(ddim_first_steps=3, ddim_last_steps=2), [1] * 8),
        (Prk(num_steps=2), [4, 4, 1, 1, 1, 1, 1, 1]),
        (Prk(ddim_first_steps=2, ddim_last_steps=3, num_steps=1), [1, 1, 4, 1, 1, 1, 1, 1]),
        (Prk(ddim_last_steps=2), [4, 4, 4, 4, 4, 4, 1, 1]),
    ],
    ids=repr,
)
def test_the_first_and_last_steps_of_multistep_samplers_may_be_ddims(sampler, calls):
    """By the number of network calls, and by the states."""
    sigmas, data, counted, states = Karras().sigmas(LogNormal(), 8), Gaussian(), [0], []

    def denoise(x, sigma):
        counted[-1] += 1
        return data.denoise(x, sigma)

    def on_step(done, total, x):
        states.append(x)
        counted.append(0)

    start = sigmas[0] * SeededNoise([4]).normal(SHAPE, dtype=torch.float64)
    sample(sampler, denoise, sigmas, SeededNoise([4]), SHAPE, dtype=torch.float64, on_step=on_step)
    assert counted[:-1] == calls
    for index, (x, result) in enumerate(zip([start, *states], states, strict=False)):
        ddim = Ddim().step(data.denoise, x, sigmas[index], sigmas[index + 1], start.clone, History())
        is_one = index < sampler.ddim_first_steps or index >= 8 - sampler.ddim_last_steps
        assert torch.allclose(result, ddim, rtol=1e-12, atol=1e-12) == is_one


@pytest.mark.parametrize(("start", "size"), [("sigma", 3.0), ("unit_variance", 10**0.5)])
def test_sampling_starts_from_noise_of_this_size(start, size):
    seen = []

    def denoise(x, sigma):
        seen.append(x)
        return x

    sample(Euler(), denoise, torch.tensor([3.0, 0.0]).double(), SeededNoise([4]), SHAPE, start=start)
    torch.testing.assert_close(seen[0], size * SeededNoise([4]).normal(SHAPE))


@pytest.mark.parametrize(("kept_noise", "of"), [("of_threshold", 1.0), ("of_network", 4.0)])
def test_ddim_keeps_the_noise_that_is_left_of_either_estimate(kept_noise, of):
    """x is 10, the network says 4, and the threshold makes 1 of it."""
    model = GuidedDenoiser(
        lambda x, sigma: (torch.full_like(x, 4.0), None), DiffusionConfig(), Threshold(kind="static")
    )
    x, sigma, sigma_next = torch.full((1, *SHAPE), 10.0), torch.tensor(3.0), torch.tensor(1.0)
    moved = Ddim(kept_noise=kept_noise).step(model, x, sigma, sigma_next, lambda: x, History())
    torch.testing.assert_close(moved, torch.full_like(x, 1 + (10 - of) / 3))
