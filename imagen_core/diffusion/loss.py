"""The training loss, for every objective and weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_core.diffusion.config import DiffusionConfig
from imagen_core.diffusion.denoiser import Denoiser, column
from imagen_core.diffusion.likelihood import bound_term
from imagen_core.diffusion.schedules import Discrete
from imagen_core.models import Conditioning


def diffusion_loss(denoiser: Denoiser, x0: Tensor, sigma: Tensor, noise: Tensor, conditioning: Conditioning) -> Tensor:
    """Loss of each image: the distance between the network's output and its target, times the weight.

    The target is what makes D(x, sigma) = x0: (x0 - c_skip x) / c_out. In this space EDM's weight lambda(sigma)
    is 1 (Karras et al. 2022, arXiv 2206.00364, equation 8). In another loss_space both are multiplied by c_out over
    the divisor of that space, so that they differ by D - x0 over the divisor. A learned variance adds vb_weight times
    the variational bound, with D held fixed (L_hybrid of Nichol and Dhariwal 2021, arXiv 2102.09672, equation 16);
    with loss kl or rescaled_kl the bound is the complete loss.

    Args:
        x0: (b, c, h, w) in [-1, 1]; for the bound, 8-bit values / 127.5 - 1.
        sigma: (b,) > 0; for the bound, levels of the discrete schedule.
        noise: (b, c, h, w), standard normal.
    Returns:
        (b,), in the dtype of x0.
    """
    level = sigma.to(x0.dtype)
    settings = denoiser.config.diffusion
    x = x0 + column(level, x0) * noise
    c = denoiser.coefficients(level)
    target = (x0 - column(c.skip, x) * x) / column(c.out, x)
    predicted, channels = denoiser.network(x, sigma, conditioning)
    estimate = column(c.skip, x) * x + column(c.out, x) * predicted
    if settings.loss in ("kl", "rescaled_kl"):
        return _bound(settings, x0, sigma, estimate, channels, all_steps=settings.loss == "rescaled_kl")
    if settings.loss_space != "output":
        scale = column(c.out / settings.loss_divisor(level), x)
        predicted, target = scale * predicted, scale * target
    distance = _distance(predicted, target, settings.loss).flatten(1).mean(dim=1) * loss_weight(settings, level)
    if channels is None:
        return distance
    return distance + settings.vb_weight * _bound(settings, x0, sigma, estimate.detach(), channels, all_steps=True)


def _bound(
    settings: DiffusionConfig, x0: Tensor, sigma: Tensor, estimate: Tensor, channels: Tensor | None, *, all_steps: bool
) -> Tensor:
    """The bound's term of the step from sigma down, (b,) bits per dimension. With `all_steps` it is multiplied by the
    number of steps: its mean over steps is then the complete bound."""
    assert isinstance(settings.schedule, Discrete)
    table = settings.schedule.sigmas().to(sigma.device)
    step = settings.schedule.step(sigma).round().long()
    below = torch.where(step > 0, table[(step - 1).clamp(min=0)], 0)
    above = table[(step + 1).clamp(max=len(table) - 1)]
    term = bound_term(settings.variance, x0, estimate, channels, sigma.double(), below, above)
    return term * len(table) if all_steps else term


def _distance(predicted: Tensor, target: Tensor, kind: str) -> Tensor:
    if kind == "l2":
        return (predicted - target) ** 2
    if kind == "l1":
        return (predicted - target).abs()
    return F.smooth_l1_loss(predicted, target, reduction="none")


def loss_weight(config: DiffusionConfig, sigma: Tensor) -> Tensor:
    """Weight (b,) of the squared error that the loss compares, at noise levels (b,), with SNR = 1 / sigma^2.

    p2: (k + SNR)^-gamma (Choi et al. 2022, arXiv 2204.00227, equation 8).
    min_snr: min(SNR, gamma) on the image's error (Hang et al. 2023, arXiv 2303.09556, equation 8).
    snr_plus_one: SNR + 1 on the image's error (Salimans and Ho 2022, arXiv 2202.00512, section 4).
    edm: (sigma^2 + sd^2)/(sigma sd)^2 on the image's error (Karras et al. 2022, table 1).
    sigmoid: sigmoid(bias - ln SNR) on the noise's error, times the rate at which the log-SNR falls with time, so that
        the mean over times is the integral over log-SNR, whatever the schedule (Hoogeboom et al. 2024, arXiv
        2410.19324, without the factor 1/2).

    snr_plus_one also equals the squared error of v, and twice the mean of the squared errors of eps and x0.

    A weight on the image's error becomes one on what the loss compares when multiplied by the square of its divisor,
    which is c_out for the network's output.
    """
    snr = sigma**-2
    if config.weight == "none":
        return torch.ones_like(sigma)
    if config.weight == "p2":
        return (config.p2_k + snr) ** -config.p2_gamma
    out = config.loss_divisor(sigma)
    if config.weight == "min_snr":
        return snr.clamp(max=config.min_snr_gamma) * out**2
    if config.weight == "snr_plus_one":
        return (snr + 1) * out**2
    if config.weight == "sigmoid":
        rate = config.schedule.log_snr_rate(sigma).to(sigma.dtype)
        return rate * torch.sigmoid(config.sigmoid_bias - snr.log()) * snr * out**2
    return (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2 * out**2
