"""The interface of samplers: a rule that takes an image from one noise level to the next lower one."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from imagen_core.config import Config
from imagen_core.diffusion.guidance import Denoise
from imagen_core.diffusion.schedules import Flow

SampleNoise = Callable[[], Tensor]
"""Fresh standard normal numbers of the image's shape."""


def mean_level(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The mean of two noise levels."""
    return (sigma + sigma_next) / 2


@dataclass(slots=True)
class History:
    """What multistep samplers remember between steps; new for every image.

    Attributes:
        num_steps: steps taken so far (counted by the samplers that need it).
        total: number of all steps.
        derivatives: slopes of the last steps, at most four, oldest first.
        estimate: D of the previous step, and sigma its noise level.
        middle: the noise level half-way between two others, in the schedule's time if there is a schedule.
        flow: the schedule, if it is that of flow matching; slopes are then by its t.
    """

    num_steps: int = 0
    total: int = 0
    derivatives: list[Tensor] = field(default_factory=list)
    estimate: Tensor | None = None
    sigma: Tensor | None = None
    middle: Callable[[Tensor, Tensor], Tensor] = mean_level
    flow: Flow | None = None

    def slope(self, x: Tensor, estimate: Tensor, sigma: Tensor) -> Tensor:
        """The derivative of the probability flow, given the estimate D of x0, of the shape of x.

        It is `derivative`; with a flow schedule the velocity dx_t/dt = (x_t - D) / t of the state x_t = (1 - t) x.
        """
        if self.flow is None:
            return derivative(x, estimate, sigma)
        return (self.flow.image_part(sigma) * x - estimate) / self.flow.t(sigma)

    def move(self, x: Tensor, slope: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """x at sigma_next, from x at sigma along a straight line of this slope."""
        if self.flow is None:
            return x + (sigma_next - sigma) * slope
        state = self.flow.image_part(sigma) * x + (self.flow.t(sigma_next) - self.flow.t(sigma)) * slope
        return state / self.flow.image_part(sigma_next)


class Sampler(Config):
    """One rule; `loop.sample` applies it over a grid of noise levels."""

    @abstractmethod
    def step(
        self, denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: SampleNoise, history: History
    ) -> Tensor:
        """Moves x (b, c, h, w) from noise level sigma > 0 to sigma_next < sigma (0 at the end); both scalars."""


def derivative(x: Tensor, estimate: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma of the probability flow, which is the estimated noise: (x - D) / sigma (Karras et al. 2022, eq. 3)."""
    return (x - estimate) / sigma
