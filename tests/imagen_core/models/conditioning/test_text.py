"""Captions: padding never matters, a dropped caption is not seen, an empty one is finite."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.conditioning.text import AttentionPooling, MeanPooling, TextConditioning
from tests.imagen_core.models.small import TEXT_DIM, captions, random_weights


def conditioning(lengths: tuple[int, ...] = (3, 5), padded_to: int = 6) -> Conditioning:
    text, mask = captions(lengths, padded_to, dtype=torch.float64)
    return Conditioning(text=text, text_mask=mask)


def module(**options) -> TextConditioning:
    return random_weights(TextConditioning(TEXT_DIM, 8, 16, **options)).double()


def dropped(c: Conditioning, *keep: bool) -> Conditioning:
    return replace(c, text_keep=torch.tensor(keep))


def visible(context: Tensor | None, mask: Tensor | None, row: int) -> Tensor:
    assert context is not None
    assert mask is not None
    return context[row][mask[row]]


def test_attention_pooling_is_a_softmax_over_the_real_tokens():
    pool, c = random_weights(AttentionPooling(TEXT_DIM)).double(), conditioning()
    assert c.text is not None
    pooled = pool(c.text, c.text_mask)
    for row, length in enumerate((3, 5)):
        tokens = c.text[row, :length]
        weights = pool.score(tokens)[:, 0].exp()
        torch.testing.assert_close(pooled[row], (weights[:, None] * tokens).sum(0) / weights.sum())


def test_mean_pooling_is_the_mean_of_the_real_tokens():
    c = conditioning()
    assert c.text is not None
    torch.testing.assert_close(MeanPooling()(c.text, c.text_mask)[0], c.text[0, :3].mean(0))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("dropped_caption", ["zero_tokens", "no_tokens"])
@pytest.mark.parametrize("null_token", [False, True])
def test_padding_does_not_matter(pooling: str, dropped_caption: str, null_token: bool):
    m = module(pooling=pooling, dropped_caption=dropped_caption, null_token=null_token)
    short, long = (m(dropped(conditioning(padded_to=n), True, False)) for n in (20, 40))
    torch.testing.assert_close(short[2], long[2], rtol=0, atol=1e-14)
    for row in range(2):
        torch.testing.assert_close(
            visible(short[0], short[1], row), visible(long[0], long[1], row), rtol=0, atol=1e-14
        )


def test_what_stands_in_the_padding_does_not_matter():
    m, c = module(), conditioning()
    assert c.text is not None
    assert c.text_mask is not None
    filled = replace(c, text=c.text.masked_fill(~c.text_mask[..., None], 7.0))
    for one, other in zip(m(c), m(filled), strict=True):
        assert torch.equal(one, other)


def test_a_dropped_row_does_not_see_its_words_but_only_their_number():
    m = module()
    c = dropped(conditioning((4, 4)), False, False)
    context, mask, vector = m(c)
    assert torch.equal(vector[0], vector[1])
    assert torch.equal(context[0], context[1])
    assert mask.sum(dim=-1).tolist() == [4, 4]  # the mask is as it was


@pytest.mark.parametrize("null_token", [False, True])
def test_a_row_dropped_to_no_tokens_does_not_depend_on_its_caption_at_all(null_token: bool):
    m = module(dropped_caption="no_tokens", null_token=null_token)
    context, mask, vector = m(dropped(conditioning((1, 6)), False, False))
    assert torch.equal(vector[0], vector[1])
    assert torch.equal(visible(context, mask, 0), visible(context, mask, 1))
    assert mask.sum(dim=-1).tolist() == [int(null_token)] * 2


def test_dropping_one_row_leaves_the_others_alone():
    m, c = module(), conditioning()
    kept, one_dropped = m(c), m(dropped(c, True, False))
    assert torch.equal(kept[2][0], one_dropped[2][0])
    assert torch.equal(kept[0][0], one_dropped[0][0])
    assert not torch.equal(kept[2][1], one_dropped[2][1])


def test_the_null_token_is_seen_in_addition_to_every_caption():
    m = module(null_token=True)
    context, mask, _ = m(conditioning((0, 5)))
    assert mask.sum(dim=-1).tolist() == [1, 6]
    assert m.null_token is not None
    assert torch.equal(context[0, 0], m.null_token)
    assert torch.equal(context[1, 0], m.null_token)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_an_empty_caption_is_finite_in_value_and_gradient(pooling: str):
    for precision in (torch.float32, torch.bfloat16):
        m = module(pooling=pooling).to(precision)
        context, _, vector = m(conditioning((0, 5)).to("cpu", precision))
        (vector.float().square().sum() + context.float().square().sum()).backward()
        assert vector.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_an_empty_caption_is_finite_under_autocast(half: torch.dtype):
    m = module().float()
    with torch.autocast("cpu", half):
        _, _, vector = m(conditioning((0, 5)).to("cpu", torch.float32))
    assert vector.isfinite().all()


def test_a_model_without_text_attention_has_no_context():
    m = module(attended=False, null_token=True)
    context, mask, vector = m(conditioning())
    assert context is None
    assert mask is None
    assert vector.shape == (2, 16)


def test_no_mask_means_that_all_tokens_are_real():
    m, c = module(), conditioning((6, 6))
    for one, other in zip(m(c), m(replace(c, text_mask=None)), strict=True):
        assert torch.equal(one, other)


def test_with_padded_tokens_the_pooling_sees_zeros_up_to_so_many():
    m, c = module(padded_tokens=9), conditioning((3, 5), 5)
    assert c.text is not None
    context, mask, vector = m(c)
    assert context.shape == (2, 9, 8)
    assert mask.sum(dim=1).tolist() == [3, 5]
    scores = m.pool.score(c.text[0, :3])[:, 0].exp()
    total = scores.sum() + 6 * m.pool.score.bias.exp()  # the score of a zero
    pooled = (scores[:, None] * c.text[0, :3]).sum(0) / total
    torch.testing.assert_close(vector[0], m.to_time(m.pooled(pooled)))
    with pytest.raises(ValueError, match=r"10 tokens, this model reads at most 9; lower max_tokens"):
        m(conditioning((3, 10), 10))


def test_with_padded_tokens_a_mean_is_of_the_projected_tokens():
    m, c = module(padded_tokens=9, pooling="mean"), conditioning()
    context, _, vector = m(c)
    assert m.pooled is None
    torch.testing.assert_close(vector, m.to_time(context.mean(dim=1)))


def test_missing_or_unfitting_text_is_refused():
    m = module()
    with pytest.raises(ValueError, match="this model reads captions"):
        m(Conditioning())
    with pytest.raises(ValueError, match=r"reads 12-wide embeddings \(got 5\)"):
        m(Conditioning(text=torch.zeros(1, 2, 5)))
