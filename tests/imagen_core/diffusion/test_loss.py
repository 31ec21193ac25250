"""Losses and weights against the papers' forms, written down in DDPM's coordinate: x_t = alpha x0 + s n."""

import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion import DiffusionConfig, diffusion_loss
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
    on_picture = {  # the squared error of the picture, in units of that of the prediction
        "eps": 1 / snr,
        "x0": torch.ones_like(snr),
        "v": 1 / (snr + 1),
        "edm": SIGMA**2 * 0.25 / (SIGMA**2 + 0.25),
    }[objective]
    return {
        "none": torch.ones_like(snr),
        "p2": (1 + snr) ** -0.5,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)) * on_picture,
        "snr_plus_one": (snr + 1) * on_picture,
        "edm": (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2 * on_picture,
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
def test_a_weight_on_the_picture_is_the_same_loss_for_every_objective(weight):
    """Networks whose outputs stand for one and the same picture have the same loss, whatever they predict."""
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


def test_float32_pictures_have_a_float32_loss_even_of_a_bfloat16_network():
    denoiser = small_denoiser()
    x0, noise, output = (tensor.float() for tensor in batch())
    stub(denoiser, lambda *_: output.bfloat16())
    loss = diffusion_loss(denoiser, x0, SIGMA, noise, Conditioning())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), measured(), rtol=0.02, atol=0)
