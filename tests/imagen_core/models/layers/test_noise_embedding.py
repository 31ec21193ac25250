"""Embeddings of the noise level."""

import math

import pytest
import torch

from imagen_core.models.layers.noise_embedding import LearnedFourierEmbedding, NoiseEmbedding, SinusoidalEmbedding


def test_sinusoids_have_geometric_frequencies():
    embedded = SinusoidalEmbedding(8)(torch.tensor([3.0], dtype=torch.float64))[0]
    for index in range(4):
        angle = 3.0 * 10_000 ** (-index / 4)
        assert embedded[index].item() == pytest.approx(math.cos(angle), abs=1e-12)
        assert embedded[4 + index].item() == pytest.approx(math.sin(angle), abs=1e-12)


def test_learned_fourier_keeps_the_value_next_to_its_waves():
    module = LearnedFourierEmbedding(2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.25, 1.0]))
    embedded = module(torch.tensor([1.0]))[0]
    torch.testing.assert_close(embedded, torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]), atol=1e-6, rtol=0)
    assert module.out_dim == 5


def test_neighbouring_steps_differ_in_a_bfloat16_model():
    module = NoiseEmbedding(SinusoidalEmbedding(32), 64).bfloat16()
    steps = module(torch.tensor([998.0, 999.0, 1000.0]))
    assert steps.dtype == torch.bfloat16
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[1], steps[2])


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"even width \(got 7\)"):
        SinusoidalEmbedding(7)
