"""Classifier-free guidance and thresholding."""

import pytest
import torch
from pydantic import ValidationError

from imagen_core.diffusion import Guidance, Threshold, guided
from imagen_core.models import Conditioning
from tests.imagen_core.diffusion.small import (
    small_denoiser,
    small_super_denoiser,
    stub,
    with_random_weights,
)

NONE = Threshold(kind="none")
SIGMA = torch.tensor(0.7, dtype=torch.float64)


def text(rows=2):
    generator = torch.Generator().manual_seed(1)
    return Conditioning(
        text=torch.randn(rows, 3, 8, generator=generator, dtype=torch.float64),
        text_mask=torch.tensor([[True, True, False]] * rows),
    )


def image(rows=2, seed=0):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def additive(denoiser):
    """A network that says 1 for the caption plus 10 times the low-resolution image; D is what it says."""

    def says(x, c_noise, conditioning):
        keep = torch.ones(len(x), dtype=torch.bool) if conditioning.text_keep is None else conditioning.text_keep
        total = keep.to(x)[:, None, None, None].expand_as(x)
        return total if conditioning.low_res is None else total + 10 * conditioning.low_res

    return stub(denoiser, says)


@pytest.mark.parametrize(("weight", "passes_of"), [(1.0, [2]), (0.0, [2]), (3.0, [4]), (-1.0, [4])])
def test_the_estimate_is_the_unconditional_one_plus_the_weighted_difference(weight, passes_of):
    denoiser = small_denoiser(diffusion={"objective": "x0"})
    network = additive(denoiser)
    estimate = guided(denoiser, text(), Guidance(text=weight), NONE)(image(), SIGMA)
    torch.testing.assert_close(estimate, torch.full_like(estimate, weight))
    assert [len(call[0]) for call in network.calls] == passes_of


def test_weight_1_is_the_conditional_and_weight_0_the_unconditional_estimate_exactly():
    denoiser = with_random_weights(small_denoiser(), seed=0).double()
    x, level = image(), SIGMA.expand(2)
    with torch.no_grad():
        conditional, unconditional = denoiser(x, level, text()), denoiser(x, level, text().unconditional())
        assert torch.equal(guided(denoiser, text(), Guidance(), NONE)(x, SIGMA), conditional)
        assert torch.equal(guided(denoiser, text(), Guidance(text=0), NONE)(x, SIGMA), unconditional)
    assert float((conditional - unconditional).abs().max()) > 1e-4


def test_one_pass_of_two_halves_equals_two_passes():
    denoiser = with_random_weights(small_denoiser(), seed=0).double()
    x = image()
    with torch.no_grad():
        one = guided(denoiser, text(), Guidance(text=4), NONE)(x, SIGMA)
        two = guided(denoiser, text(), Guidance(text=4, two_passes=True), NONE)(x, SIGMA)
        conditional = denoiser(x, SIGMA.expand(2), text())
        unconditional = denoiser(x, SIGMA.expand(2), text().unconditional())
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    torch.testing.assert_close(one, unconditional + 4 * (conditional - unconditional), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("text_weight", "low_res_weight", "passes"),
    [(1.0, 1.0, 1), (3.0, 1.0, 2), (1.0, 2.0, 3), (3.0, 2.0, 3), (2.0, 2.0, 2), (0.0, 1.0, 1), (0.0, 0.0, 1)],
)
@pytest.mark.parametrize("two_passes", [False, True])
def test_each_condition_has_its_weight_and_only_terms_that_count_are_computed(
    text_weight, low_res_weight, passes, two_passes
):
    denoiser = small_super_denoiser(diffusion={"objective": "x0"})
    network = additive(denoiser)
    low_res = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
    conditioning = Conditioning(
        text=text().text, text_mask=text().text_mask, low_res=low_res, low_res_noise=torch.zeros(2)
    )
    guidance = Guidance(text=text_weight, low_res=low_res_weight, two_passes=two_passes)
    estimate = guided(denoiser, conditioning, guidance, NONE)(image(), SIGMA)
    # D_0 = 0, D_low_res = 5, D_all = 6
    torch.testing.assert_close(estimate, torch.full_like(estimate, low_res_weight * 5 + text_weight * 1))
    assert sum(len(call[0]) for call in network.calls) == 2 * passes
    assert len(network.calls) == (passes if two_passes else 1)


@pytest.mark.parametrize(("weights", "passes"), [((1, 3), 3), ((3, 3), 2), ((4, 1), 2), ((5, 2), 3), ((0, 0), 1)])
def test_captions_and_transcriptions_are_weighed_apart(weights, passes):
    denoiser = small_denoiser(diffusion={"objective": "x0"})

    def says(x, c_noise, conditioning):
        kept = [torch.ones(len(x)) if k is None else k for k in (conditioning.text_keep, conditioning.characters_keep)]
        return (kept[0] + 10 * kept[1]).to(x)[:, None, None, None].expand_as(x)

    network = stub(denoiser, says)
    conditioning = Conditioning(
        text=text().text, text_mask=text().text_mask, characters=torch.ones(2, 4, dtype=torch.int64)
    )
    guidance = Guidance(text=weights[0], transcription=weights[1])
    estimate = guided(denoiser, conditioning, guidance, NONE)(image(), SIGMA)
    # D_0 = 0, D_transcription = 10, D_all = 11
    torch.testing.assert_close(estimate, torch.full_like(estimate, weights[0] * 1 + weights[1] * 10))
    assert sum(len(call[0]) for call in network.calls) == 2 * passes


def test_without_a_caption_the_weight_of_captions_has_nothing_to_weigh():
    denoiser = small_denoiser(diffusion={"objective": "x0"})
    network = stub(denoiser, lambda x, *_: x)
    guided(denoiser, Conditioning(), Guidance(text=7), NONE)(image(), SIGMA)
    assert [len(call[0]) for call in network.calls] == [2]


@pytest.mark.parametrize(
    ("limits", "weights"),
    [
        ({"after_sigma": 1.0}, [1, 5, 5]),
        ({"until_sigma": 1.0}, [5, 5, 1]),
        ({"after_sigma": 2.0, "until_sigma": 0.5}, [1, 5, 1]),
        ({}, [5, 5, 5]),
    ],
)
@pytest.mark.parametrize("two_passes", [False, True])
def test_guidance_may_be_limited_to_some_noise_levels(limits, weights, two_passes):
    denoiser = small_denoiser(diffusion={"objective": "x0"})
    network = additive(denoiser)
    denoise = guided(denoiser, text(), Guidance(text=5, two_passes=two_passes, **limits), NONE)
    found = [float(denoise(image(), torch.tensor(sigma, dtype=torch.float64)).mean()) for sigma in (10, 1.0, 0.1)]
    assert found == weights
    assert sum(len(call[0]) for call in network.calls) == sum(2 if weight == 1 else 4 for weight in weights)


def test_limits_of_guidance_the_wrong_way_round_are_refused():
    with pytest.raises(ValidationError, match=r"after_sigma must not be below until_sigma \(got 0.5 and 2.0\)"):
        Guidance(after_sigma=0.5, until_sigma=2.0)


def test_thresholding_comes_after_guidance():
    denoiser = small_denoiser(diffusion={"objective": "x0"})
    additive(denoiser)
    estimate = guided(denoiser, text(), Guidance(text=5), Threshold(kind="static"))(image(), SIGMA)
    assert torch.equal(estimate, torch.ones_like(estimate))


ROW = torch.linspace(-4, 4, 81, dtype=torch.float64).reshape(1, 1, 9, 9)


def test_none_changes_nothing_and_static_clips():
    assert torch.equal(Threshold(kind="none")(ROW), ROW)
    assert torch.equal(Threshold(kind="static")(ROW), ROW.clamp(-1, 1))


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.95, 0.995, 1.0])
def test_dynamic_clips_to_the_percentile_and_rescales(percentile):
    limit = float(torch.quantile(ROW.abs().flatten(), percentile))
    expected = ROW.clamp(-limit, limit) / limit
    torch.testing.assert_close(Threshold(percentile=percentile)(ROW), expected, rtol=1e-6, atol=0)


def test_dynamic_leaves_images_in_range_alone():
    torch.testing.assert_close(Threshold()(ROW / 8), ROW / 8, rtol=0, atol=0)


def test_the_cap_bounds_the_divisor():
    """IF caps it at 1.5: brighter images are clipped rather than dimmed."""
    capped = Threshold(percentile=1.0, cap=1.5)(ROW)
    torch.testing.assert_close(capped, ROW.clamp(-1.5, 1.5) / 1.5)


def test_each_image_of_a_batch_has_its_own_percentile():
    batch = torch.cat([ROW, ROW / 8])
    torch.testing.assert_close(Threshold()(batch), torch.cat([Threshold()(ROW), ROW / 8]))


def test_a_batch_of_large_images_is_thresholded():
    large = torch.full((6, 3, 1024, 1024), 2.0)  # more numbers than torch.quantile takes in one row
    assert float(Threshold()(large).max()) == 1.0


@torch.no_grad()
def test_what_depends_on_conditions_alone_is_computed_once_for_all_steps():
    denoiser = with_random_weights(small_denoiser(), seed=0).double()
    sizes = []
    denoiser.net.inputs.text.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0].text)))
    conditioning = text()
    guide = guided(denoiser, conditioning, Guidance(text=3.0), NONE)
    levels = [SIGMA, SIGMA / 2, SIGMA / 4]
    found = [guide(image(seed=step), level) for step, level in enumerate(levels)]
    assert sizes == [4]
    for step, level in enumerate(levels):
        single = guided(denoiser, conditioning, Guidance(text=3.0), NONE)(image(seed=step), level)
        assert torch.equal(found[step], single)
    with torch.enable_grad():
        guide(image(), SIGMA)
    assert sizes[-2:] == [4, 4]  # with gradients it is computed again
    assert conditioning.memory is None
