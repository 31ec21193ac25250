"""Losses and weights against the papers' forms, written down in DDPM's coordinate: x_t = alpha x0 + s n."""

import math

import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion import DiffusionConfig, diffusion_loss
from imagen_core.diffusion.likelihood import bound_term
from imagen_core.diffusion.schedules import Discrete
from imagen_core.models import Conditioning
from tests.imagen_core.diffusion.small import small_denoiser, stub

OBJECTIVES = ["eps", "x0", "v", "edm"]
WEIGHTS = ["none", "p2", "min_snr", "snr_plus_one", "edm"]
SIGMA = torch.tensor([0.05, 0.4, 1.0, 3.0, 40.0], dtype=torch.float64)


def batch():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(5, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    noise, output = (torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, noise, output


def measured(**diffusion):
    """Losses of a network that predicts `output` whatever it sees."""
    denoiser = small_denoiser(diffusion=diffusion)
    x0, noise, output = batch()
    stub(denoiser, lambda x, c_noise, conditioning: output)
    return diffusion_loss(denoiser, x0, SIGMA, noise, Conditioning())


def column(values):
    return values.reshape(-1, 1, 1, 1)


def prediction_and_target(objective):
    x0, noise, output = batch()
    alpha, level = column(1 / (1 + SIGMA**2).sqrt()), column(SIGMA / (1 + SIGMA**2).sqrt())
    if objective == "eps":
        return output, noise
    if objective == "x0":
        return output, x0
    if objective == "v":
        return output, alpha * noise - level * x0
    total = (column(SIGMA) ** 2 + 0.25).sqrt()
    x = (alpha * x0 + level * noise) / alpha
    return output, (x0 - 0.25 / total**2 * x) / (column(SIGMA) * 0.5 / total)


def distance(kind, difference):
    if kind == "l2":
        return difference**2
    if kind == "l1":
        return difference.abs()
    return torch.where(difference.abs() < 1, 0.5 * difference**2, difference.abs() - 0.5)


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_weight_it_is_the_distance_to_what_the_network_should_predict(objective, loss):
    predicted, target = prediction_and_target(objective)
    expected = distance(loss, predicted - target).mean(dim=(1, 2, 3))
    torch.testing.assert_close(measured(objective=objective, loss=loss), expected, rtol=1e-9, atol=0)


def published_weight(weight, objective):
    """The weight each paper puts on the squared error of this objective's prediction."""
    snr = 1 / SIGMA**2
    on_image = {  # the squared error of the image, in units of that of the prediction
        "eps": 1 / snr,
        "x0": torch.ones_like(snr),
        "v": 1 / (snr + 1),
        "edm": SIGMA**2 * 0.25 / (SIGMA**2 + 0.25),
    }[objective]
    return {
        "none": torch.ones_like(snr),
        "p2": (1 + snr) ** -0.5,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)) * on_image,
        "snr_plus_one": (snr + 1) * on_image,
        "edm": (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2 * on_image,
    }[weight]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_are_those_of_the_papers(objective, weight):
    predicted, target = prediction_and_target(objective)
    expected = ((predicted - target) ** 2).mean(dim=(1, 2, 3)) * published_weight(weight, objective)
    torch.testing.assert_close(measured(objective=objective, weight=weight), expected, rtol=1e-9, atol=0)


def test_weights_that_cancel_are_1():
    none = measured(objective="v", weight="none")
    torch.testing.assert_close(measured(objective="v", weight="snr_plus_one"), none)
    none = measured(objective="edm", weight="none")
    torch.testing.assert_close(measured(objective="edm", weight="edm"), none)
    low_snr = SIGMA > 5**-0.5  # there min-SNR is plain eps
    torch.testing.assert_close(
        measured(objective="eps", weight="min_snr")[low_snr], measured(objective="eps", weight="none")[low_snr]
    )


@pytest.mark.parametrize("weight", ["min_snr", "snr_plus_one", "edm"])
def test_a_weight_on_the_image_is_the_same_loss_for_every_objective(weight):
    """Networks whose outputs stand for one and the same image have the same loss, whatever they predict."""
    x0, noise, guess = batch()
    x = x0 + column(SIGMA) * noise
    losses = []
    for objective in OBJECTIVES:
        denoiser = small_denoiser(diffusion={"objective": objective, "weight": weight})
        c = denoiser.coefficients(SIGMA)
        output = (guess - column(c.skip) * x) / column(c.out)
        stub(denoiser, lambda *_, output=output: output)
        losses.append(diffusion_loss(denoiser, x0, SIGMA, noise, Conditioning()))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=0)


def test_p2_reads_its_k_and_gamma():
    plain = measured(objective="eps")
    weighted = measured(objective="eps", weight="p2", p2_k=2.0, p2_gamma=1.5)
    torch.testing.assert_close(weighted / plain, (2 + 1 / SIGMA**2) ** -1.5)


def test_a_gamma_of_p2_above_2_is_refused():
    with pytest.raises(ValidationError, match="p2_gamma"):
        DiffusionConfig(weight="p2", p2_gamma=2.1)


def test_a_perfect_network_has_no_loss():
    for objective in OBJECTIVES:
        denoiser = small_denoiser(diffusion={"objective": objective})
        _, target = prediction_and_target(objective)
        stub(denoiser, lambda *_, target=target: target)
        x0, noise, _ = batch()
        assert float(diffusion_loss(denoiser, x0, SIGMA, noise, Conditioning()).max()) < 1e-12


def test_float32_images_have_a_float32_loss_even_of_a_bfloat16_network():
    denoiser = small_denoiser()
    x0, noise, output = (tensor.float() for tensor in batch())
    stub(denoiser, lambda *_: output.bfloat16())
    loss = diffusion_loss(denoiser, x0, SIGMA, noise, Conditioning())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), measured(), rtol=0.02, atol=0)


STEPS = [0, 3, 40, 99]
TABLE = Discrete(num_steps=100).sigmas()


def with_variance(**diffusion):
    """A discrete model whose network outputs differentiable tensors, and the network's inputs."""
    settings = {"schedule": {"kind": "discrete", "num_steps": 100}, "objective": "eps", "variance": "learned_range"}
    denoiser = small_denoiser(unet={"out_channels": 6}, diffusion=settings | diffusion)
    generator = torch.Generator().manual_seed(0)
    x0 = (torch.rand(4, 3, 8, 8, generator=generator, dtype=torch.float64) * 255).round() / 127.5 - 1
    noise, mean, says = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    mean.requires_grad_(), says.requires_grad_()
    stub(denoiser, lambda *_: torch.cat([mean, says], dim=1))
    return denoiser, x0, noise, mean, says


def bound_of(x0, noise, mean, says):
    """The bound's terms of an eps model at STEPS."""
    sigma, zero = TABLE[STEPS], torch.zeros(1, dtype=torch.float64)
    estimate = x0 + column(sigma) * (noise - mean)
    below, above = torch.cat([zero, TABLE])[STEPS], torch.cat([TABLE, TABLE[-1:]])[1:][STEPS]
    return bound_term("learned_range", x0, estimate, says, sigma, below, above)


def test_a_learned_variance_adds_the_bound_with_the_mean_held_fixed():
    """L_hybrid of Nichol and Dhariwal 2021, equation 16: the sum over all steps, estimated from the sampled one."""
    denoiser, x0, noise, mean, says = with_variance()
    loss = diffusion_loss(denoiser, x0, TABLE[STEPS], noise, Conditioning())
    simple = ((mean - noise) ** 2).mean(dim=(1, 2, 3))
    bound = bound_of(x0, noise, mean, says)
    torch.testing.assert_close(loss, simple + 0.001 * 100 * bound)
    found = torch.autograd.grad(loss.sum(), [mean, says])
    torch.testing.assert_close(found[0], torch.autograd.grad(simple.sum(), mean)[0])
    torch.testing.assert_close(found[1], torch.autograd.grad(0.1 * bound.sum(), says)[0])
    assert all(bool(gradient.isfinite().all()) for gradient in found)


def test_the_bounds_weight_is_read():
    """1 / T is iDDPM's `mse`, 0.001 its `rescaled_mse`, 0.001 / T DALLE2-pytorch's 0.001."""
    losses = {}
    for weight in (0.0, 0.001, 0.01):
        denoiser, x0, noise, mean, says = with_variance(vb_weight=weight)
        losses[weight] = diffusion_loss(denoiser, x0, TABLE[STEPS], noise, Conditioning())
    torch.testing.assert_close(losses[0.01] - losses[0.0], 10 * (losses[0.001] - losses[0.0]))
    torch.testing.assert_close(losses[0.01] - losses[0.0], bound_of(x0, noise, mean, says))


def test_kl_is_the_bound_alone_and_teaches_mean_and_variance():
    denoiser, x0, noise, mean, says = with_variance(loss="kl")
    loss, bound = (
        diffusion_loss(denoiser, x0, TABLE[STEPS], noise, Conditioning()),
        bound_of(x0, noise, mean, says),
    )
    torch.testing.assert_close(loss, bound)
    found, expected = (torch.autograd.grad(values.sum(), [mean, says]) for values in (loss, bound))
    torch.testing.assert_close(found, expected)
    assert all(bool((gradient != 0).any()) for gradient in found)
    rescaled, *_ = with_variance(loss="rescaled_kl")
    torch.testing.assert_close(diffusion_loss(rescaled, x0, TABLE[STEPS], noise, Conditioning()), 100 * loss)


def test_kl_of_a_fixed_variance_teaches_the_mean():
    denoiser, x0, noise, mean, _ = with_variance(loss="kl", variance="fixed_small")
    loss = diffusion_loss(denoiser, x0, TABLE[STEPS], noise, Conditioning())
    snr = TABLE**-2
    error = ((TABLE[STEPS][:, None, None, None] * (mean - noise)) ** 2).mean(dim=(1, 2, 3))
    expected = (snr[[2, 39, 98]] - snr[[3, 40, 99]]) * error[1:] / 2 / math.log(2)
    torch.testing.assert_close(loss[1:], expected)
    assert bool((torch.autograd.grad(loss.sum(), mean)[0] != 0).all())


def test_gradients_of_the_bound_are_finite_in_float32_at_every_step():
    bound = {"variance": "learned_range", "loss": "rescaled_kl"}
    schedule = {"kind": "discrete", "beta": "cosine"}
    denoiser = small_denoiser(unet={"out_channels": 6}, diffusion={"schedule": schedule, "objective": "eps"} | bound)
    sigma = denoiser.config.diffusion.schedule.sigmas()
    generator = torch.Generator().manual_seed(0)
    x0 = (torch.rand(1000, 3, 8, 8, generator=generator) * 255).round() / 127.5 - 1
    output = torch.zeros(1000, 6, 8, 8, requires_grad=True)
    stub(denoiser, lambda *_: output)
    loss = diffusion_loss(denoiser, x0, sigma, torch.randn(1000, 3, 8, 8, generator=generator), Conditioning())
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite().all())
    assert bool(output.grad.isfinite().all())


@pytest.mark.parametrize("loss", ["kl", "rescaled_kl"])
def test_the_bound_needs_discrete_steps_and_takes_no_weight(loss):
    with pytest.raises(ValidationError, match=f"loss={loss} needs a discrete schedule"):
        DiffusionConfig(loss=loss)
    with pytest.raises(ValidationError, match=f"loss={loss} has no weight by noise level"):
        DiffusionConfig.model_validate({"loss": loss, "schedule": {"kind": "discrete"}, "weight": "p2"})


def test_improved_diffusions_balanced_v_and_snr_plus_one_are_one_weight_up_to_a_factor():
    """The mean of the errors of eps and x0, the error of v, and (SNR + 1) / SNR on that of eps."""
    x0, noise, output = batch()
    alpha, level = column(1 / (1 + SIGMA**2).sqrt()), column(SIGMA / (1 + SIGMA**2).sqrt())
    image = (alpha * x0 + level * noise - level * output) / alpha
    mse_eps, mse_x0 = (((a - b) ** 2).mean(dim=(1, 2, 3)) for a, b in ((output, noise), (image, x0)))
    mse_v = ((alpha * output - level * image - alpha * noise + level * x0) ** 2).mean(dim=(1, 2, 3))
    found = measured(objective="eps", weight="snr_plus_one")
    torch.testing.assert_close(found, mse_v)
    torch.testing.assert_close(found, 2 * (mse_eps + mse_x0) / 2)
    torch.testing.assert_close(found, (SIGMA**-2 + 1) / SIGMA**-2 * mse_eps)
