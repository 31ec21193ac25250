"""Captions laid end to end give what transformers gives one by one, for every member of the T5 family."""

import copy

import pytest
import torch
from transformers import MT5Config, MT5EncoderModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from stages.encoders.packed.t5 import PackedT5

SMALL = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
FAMILY = {
    "T5, first version: ReLU": (T5EncoderModel, T5Config, {"feed_forward_proj": "relu"}),
    "v1.1: gated GELU": (T5EncoderModel, T5Config, {"feed_forward_proj": "gated-gelu"}),
    "gated SiLU": (T5EncoderModel, T5Config, {"feed_forward_proj": "gated-silu"}),
    "mT5": (MT5EncoderModel, MT5Config, {}),
    "umT5: biases of its own in each layer": (UMT5EncoderModel, UMT5Config, {}),
}
LENGTHS = [33, 12, 12, 12, 7, 2, 2, 1]


@pytest.fixture(params=list(FAMILY))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    model_class, config_class, changes = FAMILY[request.param]
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL, **changes)).double().eval().requires_grad_(False)
    for parameter in model.parameters():  # random norms too, and biases that matter
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5) + (parameter.ndim == 1))
    return model


@torch.inference_mode()
def test_every_caption_is_what_transformers_gives_alone(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 50, (sum(LENGTHS),))
    found = PackedT5(copy.deepcopy(model))(ids, LENGTHS)
    for mine, part in zip(found.split(LENGTHS), ids.split(LENGTHS), strict=True):
        expected = model(input_ids=part[None]).last_hidden_state[0]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)  # T5 norms in float32


@torch.inference_mode()
def test_the_order_of_lengths_is_free(model: torch.nn.Module) -> None:
    packed, ids = PackedT5(copy.deepcopy(model)), torch.randint(1, 50, (sum(LENGTHS),))
    forwards = packed(ids, LENGTHS).split(LENGTHS)
    parts = ids.split(LENGTHS)[::-1]
    backwards = PackedT5(copy.deepcopy(model))(torch.cat(parts), LENGTHS[::-1]).split(LENGTHS[::-1])[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
