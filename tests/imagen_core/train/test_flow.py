"""Training by flow matching."""

from pathlib import Path

import pytest
import torch

from imagen_core.diffusion import Denoiser, diffusion_loss
from imagen_core.diffusion.schedules import Flow
from imagen_core.train.data.example import make_example
from imagen_core.train.evaluation import sample_grid
from tests.imagen_core.train.small import BASE, FLOW, SUPER, first_batch, make_config, make_context

VELOCITY = {"schedule": {"kind": "flow"}, "objective": "velocity"}
UNIFORM = {"schedule": {"kind": "flow", "uniform_fraction": 1.0}, "objective": "velocity"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "denoiser",
    [BASE | {"diffusion": VELOCITY}, SUPER | {"diffusion": FLOW}],
    ids=["velocity", "super-resolution by images and the loss of velocities"],
)
def test_a_batch_is_learned(store: Path, denoiser: dict[str, object]) -> None:
    config = make_config(store, denoiser=denoiser, batch_size=4)
    torch.manual_seed(0)
    model = Denoiser(config.denoiser).double()
    example = make_example(first_batch(config), config, model, torch.device("cpu"), step=0)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(15):
        loss = diffusion_loss(model, example.x0, example.sigma, example.noise, example.conditioning).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_noise_levels_of_a_batch_are_those_of_the_schedule(store: Path) -> None:
    config = make_config(store, denoiser=BASE | {"diffusion": UNIFORM}, batch_size=32)
    denoiser = Denoiser(config.denoiser).double()
    example = make_example(first_batch(config), config, denoiser, torch.device("cpu"), step=0)
    flow = config.denoiser.diffusion.schedule
    assert isinstance(flow, Flow)
    t = flow.t(example.sigma)
    assert float(t.min()) < 0.15
    assert float(t.max()) > 0.85
    assert float(t.mean()) == pytest.approx(0.5, abs=0.15)


def test_grids_are_sampled_at_equal_steps_of_t(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(store, denoiser=BASE | {"diffusion": VELOCITY}, grid={"num_images": 2, "num_steps": 3})
    denoiser, seen = Denoiser(config.denoiser).double().eval(), []
    forward = denoiser.forward

    def seeing(x: torch.Tensor, sigma: torch.Tensor, conditioning: object) -> torch.Tensor:
        seen.append(float(Flow().t(sigma[0])))
        return forward(x, sigma, conditioning)  # type: ignore[arg-type]

    monkeypatch.setattr(denoiser, "forward", seeing)
    assert sample_grid(make_context(config, denoiser)).shape[2] == 3
    assert seen == pytest.approx([0.9999, 0.9999 * 2 / 3, 0.9999 / 3], abs=1e-6)
