"""Sampling image embeddings with a prior: their length, the best of several, and their similarities."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_core.diffusion import Denoiser, Guidance, PriorConfig, Threshold, diffusion_loss, guided
from imagen_core.models import Conditioning
from imagen_core.prior import PriorSamplingConfig, generate_embeddings, prior_similarities
from tests.imagen_core.models.small import random_weights

DIM = 16
NETWORK = {"dim": DIM, "depth": 1, "num_heads": 2, "head_dim": 8}


def prior(**changes: object) -> Denoiser:
    config = PriorConfig.model_validate({"kind": "prior", "network": NETWORK, **changes})
    return random_weights(Denoiser(config).double()).eval()


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generate(model: Denoiser, embed: Tensor, seeds: list[int], **settings: object) -> Tensor:
    config = PriorSamplingConfig.model_validate({"num_steps": 4, **settings})
    return generate_embeddings(model, Conditioning(text_embed=embed), seeds, config, dtype=torch.float64)


def test_of_several_embeddings_the_one_most_like_the_caption_is_kept() -> None:
    model, embed, seeds = prior(), rows(6), list(range(6))
    found = torch.stack([generate(model, embed, seeds, num_candidates=count) for count in (1, 2, 3, 4)])  # (n, b, dim)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4, 6, dtype=torch.float64))
    likeness = F.cosine_similarity(found, embed.expand_as(found), dim=-1)
    assert bool((likeness.diff(dim=0) >= -1e-12).all())
    assert bool((likeness[-1] > likeness[0] + 1e-3).any())


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    model, embed = prior(), rows(3)
    torch.testing.assert_close(generate(model, embed[1:2], [8])[0], generate(model, embed, [7, 8, 9])[1])


@torch.no_grad()
def test_estimates_are_scaled_to_the_length_of_the_embeddings_if_configured() -> None:
    x, sigma, conditioning = (
        3 * rows(2),
        torch.tensor(0.7, dtype=torch.float64),
        Conditioning(text_embed=rows(2, seed=1)),
    )
    lengths = torch.full((2,), 5.0, dtype=torch.float64)
    assert PriorConfig.model_validate({"kind": "prior", "network": NETWORK}).length == DIM**0.5
    free, clamped = prior(embed_length=5.0), prior(embed_length=5.0, clamp_prediction=True)
    torch.testing.assert_close(clamped(x, sigma.expand(2), conditioning).norm(dim=-1), lengths)
    assert not torch.allclose(free(x, sigma.expand(2), conditioning).norm(dim=-1), lengths)
    estimate = guided(free, conditioning, Guidance(), Threshold(kind="length"))(x, sigma)
    torch.testing.assert_close(estimate.norm(dim=-1), lengths)
    with pytest.raises(ValueError, match="clamp_prediction is for objective x0"):
        prior(clamp_prediction=True, diffusion={"schedule": {"kind": "discrete"}, "objective": "v"})


FLOWS = [("velocity", "output"), ("x0", "velocity"), ("eps", "x0")]


@pytest.mark.parametrize(("objective", "space"), FLOWS)
def test_a_prior_learns_by_flow_matching(objective: str, space: str) -> None:
    diffusion = {"schedule": {"kind": "flow"}, "objective": objective, "loss_space": space}
    model = Denoiser(
        PriorConfig.model_validate({"kind": "prior", "network": NETWORK, "diffusion": diffusion})
    ).double()
    settings = model.config
    assert isinstance(settings, PriorConfig)
    images, condition = settings.to_length(rows(8)), Conditioning(text_embed=rows(8, seed=1))
    sigma = settings.diffusion.schedule.sigma((torch.arange(8) + 0.5) / 8)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = diffusion_loss(model, images, sigma, rows(8, seed=2), condition).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    found = generate(model.eval(), rows(3, seed=1), [1, 2, 3], sampler={"kind": "heun"})
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, dtype=torch.float64))


def test_similarities_are_mean_cosines_to_images_captions_and_the_caption_before() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    generated, image, text = axes, axes[[0, 1, 0]], axes[[0, 2, 1]]
    found = prior_similarities(2 * generated, 3 * image, 4 * text)
    assert (found.with_image, found.with_text) == pytest.approx((2 / 3, 1 / 3))
    assert found.with_unrelated_text == pytest.approx(1 / 3)  # the captions before are e1, e0, e2
    assert (found.baseline, found.above_baseline) == pytest.approx((1 / 3, 0))
    with pytest.raises(ValueError, match="needs two pairs or more"):
        prior_similarities(generated[:1], image[:1], text[:1])


def test_thresholds_for_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold.kind: static is for images; a prior takes none or length"):
        PriorSamplingConfig.model_validate({"threshold": {"kind": "static"}})
