"""A caption as one vector by multi-head attention."""

import pytest
import torch
from torch import Tensor

from imagen_core.models.conditioning.multihead_pooling import MultiheadPooling
from tests.imagen_core.models.small import random_weights, regular

DIM, OUT = 12, 20


@pytest.fixture
def pooling() -> MultiheadPooling:
    return random_weights(MultiheadPooling(DIM, OUT, num_heads=3)).eval()


def test_tokens_that_are_alike_and_no_query_of_its_own_give_the_value_of_one(pooling: MultiheadPooling) -> None:
    """All keys are then the same, so that the softmax has no say."""
    with torch.no_grad():
        pooling.query.zero_()
    token = torch.randn(2, 1, DIM)
    value = pooling.to_kv(pooling.norm(token[:, 0]))[:, DIM:]
    expected = pooling.norm_out(pooling.proj(value))
    found = pooling(token.expand(-1, 5, -1), torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(found, expected)


def test_heads_are_softmaxes_of_their_own_part_of_the_width(pooling: MultiheadPooling) -> None:
    text = torch.randn(1, 4, DIM)
    found = pooling(text, torch.ones(1, 4, dtype=torch.bool))
    normed = pooling.norm(text)[0]
    query = normed.mean(dim=0) + pooling.query
    tokens = torch.cat([query[None], normed])
    q, (k, v) = pooling.to_q(query), pooling.to_kv(tokens).chunk(2, dim=1)
    heads: list[Tensor] = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        weights = (k[:, part] @ q[part] / 4**0.5).softmax(dim=0)
        heads.append(weights @ v[:, part])
    torch.testing.assert_close(found[0], pooling.norm_out(pooling.proj(torch.cat(heads))))


def test_tokens_that_are_not_real_change_nothing(pooling: MultiheadPooling) -> None:
    text, mask = torch.randn(2, 6, DIM), torch.arange(6) < torch.tensor([[6], [2]])
    found = pooling(text, mask)
    torch.testing.assert_close(found[1], pooling(text[1:, :2], mask[1:, :2])[0])
    assert torch.equal(found[1], pooling(text.masked_fill(~mask[..., None], 3.0), mask)[1])


def test_a_caption_without_tokens_is_finite_in_value_and_gradient(pooling: MultiheadPooling) -> None:
    text = torch.randn(1, 3, DIM, requires_grad=True)
    pooling(text, torch.zeros(1, 3, dtype=torch.bool)).sum().backward()
    assert text.grad is not None
    assert text.grad.isfinite().all()


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="pooling_heads 5 does not divide the text's width 12"):
        regular(pooling="multihead", pooling_heads=5)
