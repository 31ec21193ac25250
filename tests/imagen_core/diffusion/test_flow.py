"""Flow matching: times, objectives and losses, written down for x_t = (1 - t) x0 + t s n."""

import math

import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion import DenoiserConfig, DiffusionConfig, PriorConfig, diffusion_loss, loss_weight
from imagen_core.diffusion.schedules import Discrete, Flow, LogNormal, LogSnrCosine, LogSnrLinear
from imagen_core.diffusion.steps import Listed, Respaced, Uniform
from imagen_core.models import Conditioning
from tests.imagen_core.diffusion.small import UNET, small_denoiser, small_super_denoiser, stub

OBJECTIVES = ["eps", "x0", "velocity"]
SPACES = ["x0", "eps", "velocity"]
T = torch.tensor([0.002, 0.04, 0.3, 0.7, 0.999], dtype=torch.float64)
PRIOR = {"dim": 16, "depth": 1, "num_heads": 2, "head_dim": 8}


def column(values):
    return values.reshape(-1, 1, 1, 1)


def batch():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(len(T), 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    noise, output = (torch.randn(x0.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, noise, output


def flow_denoiser(output, scale=1.0, time_scale=1.0, **diffusion):
    """A denoiser whose network predicts `output` whatever it sees."""
    schedule = {"kind": "flow", "noise_scale": scale, "time_scale": time_scale}
    denoiser = small_denoiser(diffusion={"schedule": schedule, **diffusion})
    return denoiser, stub(denoiser, lambda x, c_noise, conditioning: output)


def image_of(objective, output, state, scale):
    """The clean image that a prediction means, at times T."""
    t = column(T)
    if objective == "x0":
        return output
    return state - t * output if objective == "velocity" else (state - t * scale * output) / (1 - t)


def test_t_and_sigma_are_one_coordinate():
    flow = Flow(noise_scale=2.0)
    torch.testing.assert_close(flow.level(T), 2 * T / (1 - T))
    torch.testing.assert_close(flow.t(flow.level(T)), T)
    torch.testing.assert_close(Flow(time_scale=1000.0).c_noise(T / (1 - T)), 1000 * T)


@pytest.mark.parametrize(("mean", "std", "shift", "scale"), [(0.0, 1.0, 1.0, 1.0), (0.8, 0.8, 3.0, 2.0)])
def test_the_logit_of_t_is_normal_and_a_shift_moves_it(mean, std, shift, scale):
    flow = Flow(mean=mean, std=std, shift=shift, noise_scale=scale)
    quantile = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.97], dtype=torch.float64)
    before = (mean + std * torch.distributions.Normal(0, 1).icdf(quantile)).sigmoid()
    torch.testing.assert_close(flow.t(flow.sigma(quantile)), shift * before / (1 + (shift - 1) * before))


def test_uniform_times_are_shifted_and_clipped():
    share = torch.linspace(0, 1, 11, dtype=torch.float64)
    flow = Flow(uniform_fraction=1.0, shift=3.0, t_min=0.1, t_max=0.95)
    torch.testing.assert_close(flow.t(flow.sigma(share)), (3 * share / (1 + 2 * share)).clamp(0.1, 0.95))


def test_a_fraction_of_the_times_is_uniform():
    flow = Flow(mean=0.5, std=0.7, uniform_fraction=0.1)
    t = flow.t(flow.sigma((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000))
    for limit in (0.02, 0.3, 0.6, 0.97):
        normal = 0.5 * (1 + math.erf((math.log(limit / (1 - limit)) - 0.5) / 0.7 / math.sqrt(2)))
        assert float((t < limit).double().mean()) == pytest.approx(0.1 * limit + 0.9 * normal, abs=1e-5)


def test_the_shift_of_a_resolution_is_the_root_of_the_ratio_of_pixels():
    by_size, given = Flow(shift_from_px=64, size_px=256), Flow(shift=math.sqrt(256**2 / 64**2))
    share = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    assert torch.equal(by_size.sigma(share), given.sigma(share))
    assert torch.equal(Uniform().sigmas(by_size, 5), Uniform().sigmas(given, 5))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_network_sees_x_t_and_t_and_predicts_what_the_objective_says(objective, scale):
    x0, noise, output = batch()
    denoiser, network = flow_denoiser(output, scale, time_scale=1000.0, objective=objective)
    sigma = scale * T / (1 - T)
    estimate = denoiser(x0 + column(sigma) * noise, sigma, Conditioning())
    state = (1 - column(T)) * x0 + column(T) * scale * noise
    torch.testing.assert_close(network.calls[0][0], state)
    torch.testing.assert_close(network.calls[0][1], 1000 * T)
    torch.testing.assert_close(estimate, image_of(objective, output, state, scale), rtol=1e-9, atol=1e-9)


def test_velocity_is_the_derivative_of_x_t():
    x0, noise, _ = batch()
    denoiser, _ = flow_denoiser(2 * noise - x0, 2.0, objective="velocity")
    sigma = 2 * T / (1 - T)
    torch.testing.assert_close(denoiser(x0 + column(sigma) * noise, sigma, Conditioning()), x0)


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
@pytest.mark.parametrize("space", ["output", *SPACES])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_compares_images_noise_or_velocities(objective, space, loss):
    scale, (x0, noise, output) = 2.0, batch()
    least = 0.05 if space == "velocity" else 0.0
    denoiser, _ = flow_denoiser(output, scale, objective=objective, loss_space=space, velocity_min_t=least, loss=loss)
    t = column(T)
    state = (1 - t) * x0 + t * scale * noise
    image, divisor = image_of(objective, output, state, scale), t.clamp(min=least)
    predicted, target = {
        "output": (output, {"eps": noise, "x0": x0, "velocity": scale * noise - x0}[objective]),
        "x0": (image, x0),
        "eps": ((state - (1 - t) * image) / (t * scale), noise),
        "velocity": ((state - image) / divisor, (state - x0) / divisor),
    }[space]
    expected = {
        "l1": torch.nn.L1Loss,
        "l2": torch.nn.MSELoss,
        "huber": torch.nn.SmoothL1Loss,
    }[loss](reduction="none")(predicted, target)
    found = diffusion_loss(denoiser, x0, scale * T / (1 - T), noise, Conditioning())
    torch.testing.assert_close(found, expected.mean(dim=(1, 2, 3)), rtol=1e-8, atol=0)


def test_velocities_of_an_image_prediction_weigh_it_by_1_over_t_squared():
    """Li and He 2025: x-prediction with v-loss."""
    x0, noise, output = batch()
    denoiser, _ = flow_denoiser(output, objective="x0", loss_space="velocity", velocity_min_t=0.05)
    expected = ((output - x0) ** 2).mean(dim=(1, 2, 3)) / T.clamp(min=0.05) ** 2
    found = diffusion_loss(denoiser, x0, T / (1 - T), noise, Conditioning())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weight", ["min_snr", "snr_plus_one", "edm", "sigmoid"])
def test_a_weight_on_the_image_is_one_loss_in_every_space(weight):
    x0, noise, output = batch()
    losses = []
    for space in ("output", *SPACES):
        denoiser, _ = flow_denoiser(output, objective="velocity", loss_space=space, weight=weight)
        losses.append(diffusion_loss(denoiser, x0, T / (1 - T), noise, Conditioning()))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


@pytest.mark.parametrize("space", ["x0", "eps"])
def test_other_schedules_compare_images_or_noise_too(space):
    x0, noise, output = batch()
    sigma = torch.tensor([0.05, 0.4, 1.0, 3.0, 40.0], dtype=torch.float64)
    denoiser = small_denoiser(diffusion={"objective": "edm", "loss_space": space})
    stub(denoiser, lambda x, c_noise, conditioning: output)
    x, total = x0 + column(sigma) * noise, column(sigma) ** 2 + 0.25
    image = 0.25 / total * x + column(sigma) * 0.5 / total.sqrt() * output
    error = image - x0 if space == "x0" else (x - image) / column(sigma) - noise
    found = diffusion_loss(denoiser, x0, sigma, noise, Conditioning())
    torch.testing.assert_close(found, (error**2).mean(dim=(1, 2, 3)))


def test_edm_keeps_its_own_coefficients():
    sigma = T / (1 - T)
    found = DiffusionConfig(schedule=Flow(noise_scale=2.0), objective="edm").coefficients(sigma)
    for name in ("skip", "out", "input"):
        assert torch.equal(getattr(found, name), getattr(DiffusionConfig().coefficients(sigma), name))


def test_a_low_resolution_image_is_noised_along_a_flow_too():
    flow = {"kind": "flow"}
    noise_levels = {"kind": "uniform", "schedule": flow, "sample_time": 0.5}
    diffusion = {"schedule": flow, "objective": "velocity"}
    denoiser = small_super_denoiser(diffusion=diffusion, low_res_noise=noise_levels)
    noise, low_res = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((1, 3, 8, 8), 0.4)
    conditioning = denoiser.with_sampling_low_res(Conditioning(), low_res, noise)  # t = 0.5 is the median
    torch.testing.assert_close(conditioning.low_res, 0.5 * low_res + 0.5 * noise)
    torch.testing.assert_close(conditioning.low_res_noise, torch.tensor([0.5]))
    clean = denoiser.with_sampling_low_res(Conditioning(), low_res, noise, 0.0)
    assert torch.equal(clean.low_res, low_res)
    torch.testing.assert_close(clean.low_res_noise, torch.tensor([0.001]))


SCHEDULES = [
    LogSnrLinear(),
    LogSnrCosine(),
    LogNormal(),
    Flow(),
    Flow(uniform_fraction=1.0, shift=3.0),
    Flow(mean=0.8, std=0.8, uniform_fraction=0.1, noise_scale=2.0),
    Discrete(),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_rate_of_the_log_snr_is_its_slope_in_time(schedule):
    time = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    step = 1e-3 if isinstance(schedule, Discrete) else 1e-5
    slope = (schedule.sigma(time + step).log() - schedule.sigma(time - step).log()) / step  # twice d ln sigma / dt
    torch.testing.assert_close(schedule.log_snr_rate(schedule.sigma(time)), slope, rtol=1e-5, atol=0)


def test_the_rate_of_a_discrete_schedule_has_one_neighbour_at_its_ends():
    table = Discrete().sigmas().log()
    expected = 2000 * torch.stack([table[1] - table[0], table[-1] - table[-2]])
    torch.testing.assert_close(Discrete().log_snr_rate(table[[0, -1]].exp()), expected)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_the_sigmoid_weight_is_that_of_simpler_diffusion(objective, bias):
    """Hoogeboom et al. 2024: exp(b) sigmoid(log-SNR - b) on images is sigmoid(b - log-SNR) on noise."""
    schedule = LogSnrCosine()
    sigma = torch.tensor([0.05, 0.4, 1.0, 3.0, 40.0], dtype=torch.float64)
    settings = DiffusionConfig(schedule=schedule, objective=objective, weight="sigmoid", sigmoid_bias=bias)
    log_snr = -2 * sigma.log()
    on_image = math.exp(bias) * torch.sigmoid(log_snr - bias) * schedule.log_snr_rate(sigma)
    on_output = {"eps": sigma**2, "x0": torch.ones_like(sigma), "v": sigma**2 / (1 + sigma**2)}[objective]
    torch.testing.assert_close(loss_weight(settings, sigma), on_image * on_output)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("schedule", SCHEDULES[:-1], ids=repr)
def test_the_mean_sigmoid_weight_is_the_integral_over_log_snr_for_every_schedule(schedule, bias):
    settings = DiffusionConfig(schedule=schedule, objective="eps", weight="sigmoid", sigmoid_bias=bias)
    low, high = 0.05, 0.95
    time = low + (high - low) * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    mean = float(loss_weight(settings, schedule.sigma(time)).mean()) * (high - low)
    ends = -2 * schedule.sigma(torch.tensor([low, high], dtype=torch.float64)).log()
    first, last = torch.nn.functional.softplus(bias - ends).tolist()
    assert mean == pytest.approx(last - first, rel=1e-6)


def test_equal_steps_end_at_t_min_or_lead_to_0():
    flow = Flow(shift=3.0, t_min=0.01, t_max=0.99, noise_scale=2.0)
    low, high = 0.01 / (0.01 + 3 * 0.99), 0.99 / (0.99 + 3 * 0.01)
    even = torch.linspace(high, low, 6, dtype=torch.float64)
    torch.testing.assert_close(flow.t(Uniform().sigmas(flow, 6))[:-1], 3 * even / (1 + 2 * even))
    strides = high * (1 - torch.arange(6, dtype=torch.float64) / 6)
    trailing = flow.t(Uniform(spacing="trailing").sigmas(flow, 6))[:-1]
    torch.testing.assert_close(trailing, 3 * strides / (1 + 2 * strides))


def test_a_grid_may_have_another_shift():
    own, other = Flow(shift=3.0), Flow(shift=1.5)
    torch.testing.assert_close(Uniform(shift=1.5).sigmas(own, 7), Uniform().sigmas(other, 7))
    with pytest.raises(ValueError, match=r"grid.shift needs a flow schedule \(got log_normal\)"):
        Uniform(shift=1.5).sigmas(LogNormal(), 7)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (Uniform(spacing="leading"), r"leading and skip_lowest need a discrete schedule \(got flow\)"),
        (Uniform(skip_lowest=True), r"leading and skip_lowest need a discrete schedule \(got flow\)"),
        (Respaced(sections="5"), r"respaced needs a discrete schedule \(got flow\)"),
        (Listed(steps=(9, 5, 0)), r"listed needs a discrete schedule \(got flow\)"),
    ],
    ids=repr,
)
def test_a_flow_has_no_steps_to_choose_from(grid, words):
    with pytest.raises(ValueError, match=words):
        grid.sigmas(Flow(), 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "prev"}, r"objective=prev needs a discrete schedule \(got flow\)"),
        ({"objective": "v"}, "objective=v is DDPM's; with schedule.kind=flow take objective=velocity"),
        ({"objective": "x0", "variance": "learned_range"}, r"needs a discrete schedule \(got flow\)"),
        ({"objective": "x0", "loss": "kl"}, r"loss=kl needs a discrete schedule \(got flow\)"),
        ({"objective": "x0", "velocity_min_t": 0.05}, r"velocity_min_t is for loss_space=velocity \(got .*output\)"),
        (
            {"schedule": {"kind": "log_normal"}, "objective": "velocity"},
            r"objective=velocity needs schedule.kind=flow \(got log_normal\)",
        ),
        (
            {"schedule": {"kind": "discrete"}, "objective": "x0", "loss_space": "velocity"},
            r"loss_space=velocity needs schedule.kind=flow \(got discrete\)",
        ),
        (
            {"schedule": {"kind": "discrete"}, "objective": "eps", "loss": "kl", "loss_space": "x0"},
            r"loss=kl has no loss_space \(got x0\)",
        ),
        ({"schedule": {"kind": "flow", "shift_from_px": 64}}, "shift by resolution needs both"),
        ({"schedule": {"kind": "flow", "shift_from_px": 64, "size_px": 256, "shift": 2}}, "give one of the two"),
        ({"schedule": {"kind": "flow", "t_min": 0.5, "t_max": 0.5}}, r"t_min must be below t_max \(got 0.5 and 0.5\)"),
    ],
)
def test_what_flow_matching_has_not_is_refused_by_name(settings, words):
    with pytest.raises(ValidationError, match=words):
        DiffusionConfig.model_validate({"schedule": {"kind": "flow"}, **settings})


def test_the_size_of_a_shift_is_that_of_the_images():
    diffusion = {"schedule": {"kind": "flow", "shift_from_px": 4, "size_px": 16}, "objective": "velocity"}
    with pytest.raises(ValidationError, match=r"diffusion.schedule.size_px is 16, but size_px is 8"):
        DenoiserConfig.model_validate({"unet": UNET, "size_px": 8, "diffusion": diffusion})
    with pytest.raises(ValidationError, match=r"diffusion.schedule.size_px: is for images; give shift itself"):
        PriorConfig.model_validate({"kind": "prior", "network": PRIOR, "diffusion": diffusion})


def test_a_prior_that_reads_step_indices_refuses_a_flow():
    network = PRIOR | {"num_timesteps": 100}
    diffusion = {"schedule": {"kind": "flow"}, "objective": "x0"}
    with pytest.raises(ValidationError, match=r"network.num_timesteps is 100, but diffusion.schedule has no discrete"):
        PriorConfig.model_validate({"kind": "prior", "network": network, "diffusion": diffusion})


def test_configurations_from_before_are_recorded_as_they_were():
    recorded = DiffusionConfig().model_dump(mode="json")
    assert recorded.keys().isdisjoint({"loss_space", "velocity_min_t", "sigmoid_bias"})
    assert "shift" not in Uniform().model_dump(mode="json")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32_losses_are_right_at_both_ends_of_time(objective):
    x0, noise, output = (tensor.float() for tensor in batch())
    double = tuple(tensor.double() for tensor in (x0, noise, output))
    ends = torch.tensor([0.001, 0.01, 0.5, 0.99, 0.9999], dtype=torch.float64)
    losses = []
    for images, normal, predicted in ((x0, noise, output), double):
        denoiser, _ = flow_denoiser(predicted, objective=objective, loss_space="velocity", velocity_min_t=0.05)
        losses.append(diffusion_loss(denoiser, images, ends / (1 - ends), normal, Conditioning()).double())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
