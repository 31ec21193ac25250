"""Noise schedules: which noise levels are trained on, and in which order sampling visits them.

Everything here is in the coordinate of Karras et al. 2022 (arXiv 2206.00364): x = x0 + sigma * n. A DDPM state
alpha * x0 + s * n is alpha * x with sigma = s / alpha and alpha = 1 / sqrt(1 + sigma^2), so a DDPM schedule is
a list, or a function, of sigmas too: log-SNR = -2 ln sigma.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from imagen_core.config import Config, default_field

_SMALLEST = 1e-12


class LogSnrLinear(Config):
    """Continuous counterpart of DDPM's linear betas: log-SNR(t) = -ln(expm1(1e-4 + 10 t^2))."""

    kind: Literal["log_snr_linear"] = "log_snr_linear"

    def sigma(self, time: Tensor) -> Tensor:
        """Time in [0, 1] -> sigma, increasing, float64."""
        return torch.expm1(1e-4 + 10 * time.double() ** 2).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return ((torch.log1p(sigma.double() ** 2) - 1e-4).clamp(min=0) / 10).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The network's input at sigma: the log-SNR."""
        return -2 * sigma.log()

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        """Minus the derivative of the log-SNR by time at sigma, float64."""
        return 20 * self.time(sigma) * (1 + sigma.double() ** -2)


class LogSnrCosine(Config):
    """Nichol and Dhariwal 2021 (arXiv 2102.09672, equation 17) in continuous time.

    The log-SNR is -2 ln tan of an angle that rises linearly from s to a right angle; the ends are truncated so
    that log-SNR stays within +-20.
    """

    kind: Literal["log_snr_cosine"] = "log_snr_cosine"
    offset: float = Field(default=0.008, gt=0)
    """The s of the paper: keeps the first noise level off zero."""

    def sigma(self, time: Tensor) -> Tensor:
        """Time in [0, 1] -> sigma, increasing, float64."""
        return torch.tan(self._angle(time.double()))

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        low, high = self._ends()
        return (torch.atan(sigma.double()) - low) / (high - low)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The network's input at sigma: the log-SNR."""
        return -2 * sigma.log()

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        """Minus the derivative of the log-SNR by time at sigma, float64."""
        low, high = self._ends()
        return 2 * (high - low) * (sigma.double() + 1 / sigma.double())

    def _angle(self, time: Tensor) -> Tensor:
        low, high = self._ends()
        return low + time * (high - low)

    def _ends(self) -> tuple[float, float]:
        low = self.offset / (1 + self.offset) * math.pi / 2
        return low, math.atan(math.exp(10.0))


class Discrete(Config):
    """DDPM in num_steps steps (Ho et al. 2020, arXiv 2006.11239), with one of the published beta schedules."""

    kind: Literal["discrete"] = "discrete"
    num_steps: int = Field(default=1000, ge=2)
    """Steps of the forward process, T."""
    beta: Literal["linear", "cosine", "quadratic", "jsd", "sigmoid"] = "linear"
    """linear, quadratic and sigmoid run from 1e-4 to 0.02, scaled by 1000 / T."""
    rescale_steps: bool = default_field(False)
    """The network reads the step times 1000 / T, as if of 1000 (improved-diffusion: rescale_timesteps)."""

    @model_validator(mode="after")
    def _check(self) -> "Discrete":
        top = float(self._betas().max())
        if not top < 1:
            raise ValueError(
                f"beta={self.beta} with num_steps={self.num_steps} has a beta of {top:.3g}, which must be below 1; "
                "use more steps or beta=cosine"
            )
        return self

    def _betas(self) -> Tensor:
        """float64 (T,)."""
        count, scale = self.num_steps, 1000 / self.num_steps
        low, high = scale * 1e-4, scale * 0.02
        if self.beta == "linear":
            return torch.linspace(low, high, count, dtype=torch.float64)
        if self.beta == "quadratic":
            return torch.linspace(low**0.5, high**0.5, count, dtype=torch.float64) ** 2
        if self.beta == "sigmoid":
            return torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64)) * (high - low) + low
        if self.beta == "jsd":  # 1/T, 1/(T-1), ..., 1: the last step would be pure noise, so it stops short of it
            return (1 / torch.linspace(count, 1, count, dtype=torch.float64)).clamp(max=0.999)
        times = torch.arange(count + 1, dtype=torch.float64) / count
        level = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)

    def sigmas(self) -> Tensor:
        """float64 (T,), increasing: the noise level after each step."""
        signal = torch.cumprod(1 - self._betas(), dim=0)
        return ((1 - signal) / signal).sqrt()

    def sigma(self, time: Tensor) -> Tensor:
        """Time in [0, 1] -> the sigma of step floor(time * T): a uniform time selects every step equally often."""
        steps = (time.double() * self.num_steps).long().clamp(max=self.num_steps - 1)
        return self.sigmas().to(time.device)[steps]

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`: step k has time k / (T - 1); between two steps linear in ln sigma."""
        return self.step(sigma) / (self.num_steps - 1)

    def step(self, sigma: Tensor) -> Tensor:
        """Sigma > 0 -> step index in [0, T - 1], float64; fractional between two steps."""
        table = self.sigmas().log().to(sigma.device)
        log_sigma = sigma.double().log().contiguous()
        above = torch.searchsorted(table, log_sigma).clamp(1, self.num_steps - 1)
        low, high = table[above - 1], table[above]
        return above - 1 + ((log_sigma - low) / (high - low)).clamp(0, 1)

    def previous(self, sigma: Tensor) -> Tensor:
        """Sigma -> the noise level one step below it, float64; 0 below the first."""
        table, step = self.sigmas().to(sigma.device), self.step(sigma) - 1
        floor = step.clamp(min=0).floor()
        low, high = (table[(floor + k).long().clamp(max=self.num_steps - 1)].log() for k in (0, 1))
        return torch.where(step < 0, (step + 1) * table[0], torch.lerp(low, high, step - floor).exp())

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The network's input at sigma: the step index, times 1000 / T with rescale_steps."""
        step = self.step(sigma)
        return step * (1000 / self.num_steps) if self.rescale_steps else step

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        """Minus the derivative of the log-SNR by time at the step of sigma, float64: by differences of its neighbours,
        at the ends by one."""
        slopes = torch.gradient(self.sigmas().log())[0].to(sigma.device)
        return 2 * self.num_steps * slopes[self.step(sigma).round().long()]


class LogNormal(Config):
    """EDM's training distribution: ln sigma is normal (Karras et al. 2022, table 1)."""

    kind: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    """Mean of ln sigma, P_mean. Higher trains the layout more, lower fine detail."""
    std: float = Field(default=1.2, gt=0)
    """Standard deviation of ln sigma, P_std."""
    sigma_min: float = Field(default=0.002, gt=0)
    """Lowest noise level of sampling."""
    sigma_max: float = Field(default=80.0, gt=0)
    """Highest noise level of sampling."""

    def sigma(self, time: Tensor) -> Tensor:
        """Time in (0, 1) -> the quantile of sigma."""
        inside = time.double().clamp(_SMALLEST, 1 - _SMALLEST)
        return torch.exp(self.mean + self.std * torch.special.ndtri(inside))

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return torch.special.ndtr((sigma.double().log() - self.mean) / self.std)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The network's input at sigma: ln(sigma) / 4."""
        return sigma.log() / 4

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        """Minus the derivative of the log-SNR by time at sigma, float64."""
        return 2 * self.std / _normal_density((sigma.double().log() - self.mean) / self.std)


class Flow(Config):
    """Flow matching along straight lines: x_t = (1 - t) x0 + t s n (Lipman et al. 2022, arXiv 2210.02747).

    In the coordinate of this file that is x_t = x / (1 + sigma / s) with sigma = s t / (1 - t). Training samples t by
    its logit, which is normal (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    """

    kind: Literal["flow"] = "flow"
    mean: float = 0.0
    """Mean of ln(t / (1 - t)); higher trains on more noise. Where published code counts time from the noise to the
    image, this is its mean times -1."""
    std: float = Field(default=1.0, gt=0)
    """Standard deviation of ln(t / (1 - t))."""
    uniform_fraction: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the training samples whose t is uniform instead; 1: all."""
    shift: float = Field(default=1.0, gt=0)
    """Every t, of training and sampling, becomes shift t / (1 + (shift - 1) t): above 1 more noise, for larger images
    (Esser et al. 2024, equation 23)."""
    shift_from_px: int | None = Field(default=None, ge=1)
    """In place of shift: side of the images that need none. The shift is then size_px / shift_from_px, the square root
    of the ratio of the numbers of pixels."""
    size_px: int | None = Field(default=None, ge=1)
    """Side of the images, for shift_from_px."""
    noise_scale: float = Field(default=1.0, gt=0)
    """Standard deviation s of the noise at t = 1 (Li and He 2025, arXiv 2511.13720: 1 for 256 px, 2 for 512 px)."""
    t_min: float = Field(default=0.001, gt=0, lt=1)
    """Lowest t of training, and of sampling before 0; lower ones become this."""
    t_max: float = Field(default=0.9999, gt=0, lt=1)
    """Highest t of training and sampling; higher ones become this. At 1 sigma would be infinite."""
    time_scale: float = Field(default=1.0, gt=0)
    """The network reads t times this; 1000 for sinusoids that are made for step indices, as in diffusers."""

    @model_validator(mode="after")
    def _check(self) -> "Flow":
        if (self.shift_from_px is None) != (self.size_px is None):
            raise ValueError(
                f"shift_from_px is {self.shift_from_px} and size_px is {self.size_px}; shift by resolution needs both"
            )
        if self.shift_from_px is not None and self.shift != 1:
            raise ValueError(f"shift is {self.shift:g} and shift_from_px {self.shift_from_px}; give one of the two")
        if not self.t_min < self.t_max:
            raise ValueError(f"t_min must be below t_max (got {self.t_min} and {self.t_max})")
        return self

    @property
    def shift_factor(self) -> float:
        """The shift, also where resolutions say it."""
        if self.shift_from_px is None or self.size_px is None:
            return self.shift
        return self.size_px / self.shift_from_px

    def level(self, t: Tensor) -> Tensor:
        """t in [0, 1) -> sigma, in the shape and dtype of t."""
        return self.noise_scale * t / (1 - t)

    def t(self, sigma: Tensor) -> Tensor:
        """Sigma >= 0 -> t in [0, 1), in the shape and dtype of sigma."""
        return sigma / (self.noise_scale + sigma)

    def image_part(self, sigma: Tensor) -> Tensor:
        """Sigma >= 0 -> 1 - t, exact also near t = 1, in the shape and dtype of sigma."""
        return self.noise_scale / (self.noise_scale + sigma)

    def sigma(self, time: Tensor) -> Tensor:
        """Time in [0, 1] -> the quantile of sigma, float64."""
        inside = time.double().clamp(_SMALLEST, 1 - _SMALLEST)
        lowest, highest = sampling_range(self)
        return (self.noise_scale * self.shift_factor * self._logit(inside).exp()).clamp(lowest, highest)

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return self._share_below(self._unshifted(sigma))

    def c_noise(self, sigma: Tensor) -> Tensor:
        """The network's input at sigma: t, times time_scale."""
        return self.t(sigma) * self.time_scale

    def log_snr_rate(self, sigma: Tensor) -> Tensor:
        """Minus the derivative of the log-SNR by time at sigma, float64."""
        logit, part = self._unshifted(sigma), self.uniform_fraction
        normal = _normal_density((logit - self.mean) / self.std) / self.std
        uniform = logit.sigmoid() * (-logit).sigmoid()
        return 2 / (part * uniform + (1 - part) * normal)

    def _unshifted(self, sigma: Tensor) -> Tensor:
        """Sigma -> ln(t / (1 - t)) before the shift, float64."""
        return (sigma.double() / (self.noise_scale * self.shift_factor)).log()

    def _share_below(self, logit: Tensor) -> Tensor:
        """ln(t / (1 - t)) before the shift -> the probability of a lower one in training."""
        normal = torch.special.ndtr((logit - self.mean) / self.std)
        return self.uniform_fraction * logit.sigmoid() + (1 - self.uniform_fraction) * normal

    def _logit(self, share: Tensor) -> Tensor:
        """The inverse of `_share_below`, by bisection between the two quantiles where both laws have a part."""
        normal, uniform = self.mean + self.std * torch.special.ndtri(share), torch.logit(share)
        if self.uniform_fraction in (0, 1):
            return uniform if self.uniform_fraction else normal
        low, high = torch.minimum(normal, uniform), torch.maximum(normal, uniform)
        for _ in range(60):
            middle = (low + high) / 2
            above = self._share_below(middle) > share
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2


NoiseSchedule = Annotated[LogSnrLinear | LogSnrCosine | Discrete | LogNormal | Flow, Field(discriminator="kind")]
"""`sigma(time)` and `time(sigma)` map time in [0, 1] to noise levels and back; training samples time uniformly."""


def sampling_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """The lowest and the highest noise level that sampling visits."""
    if isinstance(schedule, LogNormal):
        return schedule.sigma_min, schedule.sigma_max
    if isinstance(schedule, Flow):
        low, high = (schedule.noise_scale * t / (1 - t) for t in (schedule.t_min, schedule.t_max))
        return low, high
    ends = schedule.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _normal_density(z: Tensor) -> Tensor:
    return (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
