"""Grids of noise levels."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from imagen_core.diffusion.schedules import Discrete, Flow, LogNormal, LogSnrCosine, LogSnrLinear, sampling_range
from imagen_core.diffusion.steps import AnyGrid, Karras, Listed, Respaced, Uniform, respaced_steps

SCHEDULES = [LogSnrLinear(), LogSnrCosine(), LogNormal(), Flow(shift=3.0), Discrete(), Discrete(beta="cosine")]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


@every_schedule
@pytest.mark.parametrize("grid", [Karras(), Uniform()], ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 999, 1000])
def test_grids_fall_strictly_to_zero_from_the_highest_level(schedule, grid, num_steps):
    sigmas = grid.sigmas(schedule, num_steps)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == num_steps + 1
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[-1]) == 0
    highest = 80.0 if isinstance(schedule, Flow) and grid == Karras() else sampling_range(schedule)[1]
    assert float(sigmas[0]) == pytest.approx(highest)


def test_karras_is_equation_5():
    sigmas = Karras().sigmas(LogNormal(), 18)
    for index in range(18):
        expected = (80 ** (1 / 7) + index / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert float(sigmas[index]) == pytest.approx(expected)


def test_karras_takes_its_own_ends_and_rho():
    sigmas = Karras(rho=1, sigma_min=1, sigma_max=5).sigmas(LogNormal(), 5)
    torch.testing.assert_close(sigmas, torch.tensor([5.0, 4, 3, 2, 1, 0], dtype=torch.float64))


def test_karras_ends_the_wrong_way_round_are_refused_with_both():
    with pytest.raises(ValueError, match=r"sigma_min must be below sigma_max \(got 6.0 and 5.0\)"):
        Karras(sigma_min=6, sigma_max=5).sigmas(LogNormal(), 5)


@pytest.mark.parametrize("schedule", [LogSnrLinear(), LogSnrCosine(), LogNormal()], ids=repr)
def test_uniform_is_even_in_the_time_of_the_schedule(schedule):
    times = schedule.time(Uniform().sigmas(schedule, 11)[:-1])
    torch.testing.assert_close(times.diff(), times.diff()[:1].expand(10), rtol=1e-4, atol=1e-9)


def test_uniform_on_a_discrete_schedule_takes_every_step_or_evenly_spaced_ones():
    table = Discrete(num_steps=100).sigmas()
    torch.testing.assert_close(Uniform().sigmas(Discrete(num_steps=100), 100)[:-1], table.flip(0))
    torch.testing.assert_close(Uniform().sigmas(Discrete(num_steps=100), 10)[:-1], table[::11].flip(0))
    assert float(Uniform().sigmas(Discrete(num_steps=100), 1)[0]) == float(table[-1])


@pytest.mark.parametrize(
    ("total", "sections", "steps"),
    [
        (10, "10", list(range(10))),
        (10, "5", [0, 2, 4, 7, 9]),
        (300, "2,3,4", [0, 99, 100, 150, 199, 200, 233, 266, 299]),
        (100, "1,1", [49, 99]),
        (1000, "ddim10", list(range(0, 1000, 100))),
        (1000, "ddim334", list(range(0, 1000, 3))),
    ],
)
def test_respacing_strings(total, sections, steps):
    assert respaced_steps(total, sections) == steps


def test_sections_have_the_requested_steps():
    steps = respaced_steps(300, "10,15,25")
    assert [sum(100 * k <= step < 100 * (k + 1) for step in steps) for k in range(3)] == [10, 15, 25]
    sigmas = Respaced(sections="10,15,25").sigmas(Discrete(num_steps=300), 50)
    torch.testing.assert_close(sigmas[:-1], Discrete(num_steps=300).sigmas()[steps].flip(0))


def test_ddim_strings_start_near_pure_noise_or_are_refused():
    """A stride that is too small would leave the highest noise levels out, and with them most of the image."""
    strided = {len(range(0, 1000, stride)): stride for stride in range(1000, 0, -1)}
    for count in range(1, 1001):
        if count in strided:
            assert respaced_steps(1000, f"ddim{count}") == list(range(0, 1000, strided[count]))
        else:
            with pytest.raises(ValueError, match=f"ddim{count}: no integer stride"):
                respaced_steps(1000, f"ddim{count}")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ("101", "101 steps requested of 100"),
        ("10,60", r"60 steps requested of 50 \(section 2 of a schedule of 100 steps\)"),
        ("ddim101", "ddim101: the schedule has 100 steps only"),
        ("ddim60", "no integer stride takes 60 of the schedule's 100 steps; use ddim50 or 60"),
    ],
)
def test_more_steps_than_there_are_is_refused_with_both_numbers(sections, words):
    with pytest.raises(ValueError, match=words):
        respaced_steps(100, sections)


def test_a_step_count_that_contradicts_the_sections_is_refused():
    with pytest.raises(ValueError, match=r"num_steps is 40, but grid\.sections=10,15,25 has 50 steps"):
        Respaced(sections="10,15,25").sigmas(Discrete(num_steps=300), 40)


def test_respacing_needs_a_discrete_schedule():
    with pytest.raises(ValueError, match=r"needs a discrete schedule \(got log_normal\)"):
        Respaced(sections="10").sigmas(LogNormal(), 10)


@pytest.mark.parametrize("sections", ["", "ddim", "ddim0", "0", "10,", "10,x", "smart50"])
def test_other_strings_are_refused(sections):
    with pytest.raises(ValidationError, match="sections"):
        TypeAdapter(AnyGrid).validate_python({"kind": "respaced", "sections": sections})


@pytest.mark.parametrize(
    ("grid", "num_steps", "steps"),
    [
        (Uniform(), 4, [99, 66, 33, 0]),
        (Uniform(spacing="leading"), 4, [75, 50, 25, 0]),
        (Uniform(spacing="leading"), 7, [84, 70, 56, 42, 28, 14, 0]),
        (Uniform(spacing="leading", offset=1), 4, [76, 51, 26, 1]),
        (Uniform(spacing="trailing"), 4, [99, 74, 49, 24]),
        (Uniform(spacing="trailing"), 3, [99, 66, 32]),
        (Uniform(skip_lowest=True), 3, [99, 66, 33]),
        (Uniform(spacing="leading", skip_lowest=True), 3, [75, 50, 25]),
        (Listed(steps=(99, 98, 50, 3)), 4, [99, 98, 50, 3]),
    ],
    ids=repr,
)
def test_spacings_take_these_steps_of_a_discrete_schedule(grid, num_steps, steps):
    schedule = Discrete(num_steps=100)
    sigmas = grid.sigmas(schedule, num_steps)
    assert sigmas[:-1].tolist() == schedule.sigmas()[steps].tolist()
    assert float(sigmas[-1]) == 0


@pytest.mark.parametrize(
    ("settings", "num_steps", "words"),
    [
        ({"kind": "uniform", "spacing": "leading", "offset": 26}, 4, "spacing=leading finds no 4 steps in a schedule"),
        ({"kind": "uniform", "spacing": "trailing"}, 101, "spacing=trailing finds no 101 steps in a schedule of 100"),
        ({"kind": "uniform", "skip_lowest": True}, 100, "101 steps requested of 100"),
        ({"kind": "listed", "steps": [100, 0]}, 2, r"grid.steps has 100, but the schedule ends at 99"),
        ({"kind": "listed", "steps": [99, 0]}, 3, r"num_steps is 3, but grid.steps has 2 steps"),
    ],
)
def test_steps_that_a_schedule_does_not_have_are_refused(settings, num_steps, words):
    grid = TypeAdapter(AnyGrid).validate_python(settings)
    with pytest.raises(ValueError, match=words):
        grid.sigmas(Discrete(num_steps=100), num_steps)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "uniform", "offset": 1}, r"offset is for spacing=leading \(got spacing=linspace\)"),
        ({"kind": "uniform", "spacing": "trailing", "skip_lowest": True}, "leaves out the lowest steps already"),
        ({"kind": "listed", "steps": [5, 5]}, r"must fall from step to step \(got 5, 5\)"),
        ({"kind": "listed", "steps": [5, -1]}, r"must not be below 0 \(got -1\)"),
        ({"kind": "listed", "steps": []}, "at least 1 item"),
    ],
)
def test_spacings_that_contradict_themselves_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(AnyGrid).validate_python(settings)


@pytest.mark.parametrize(
    "grid", [Uniform(spacing="leading"), Uniform(skip_lowest=True), Listed(steps=(1, 0))], ids=repr
)
def test_a_continuous_schedule_has_no_steps_to_choose_from(grid):
    with pytest.raises(ValueError, match=r"a discrete schedule \(got log_normal\)"):
        grid.sigmas(LogNormal(), 2)


def test_a_grid_from_before_there_were_spacings_is_recorded_as_it_was():
    assert Uniform().model_dump() == {"kind": "uniform"}
    assert Uniform(spacing="leading").model_dump() == {"kind": "uniform", "spacing": "leading"}
