"""Inputs that DALLE2-pytorch and we make alike."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.imagen_core.conversion.minimagen.numbers import numbers
from tests.imagen_core.conversion.minimagen.numbers import weights as own_weights

DIM = 16
"""Width of the embeddings of captions and images, and of captions' tokens."""
STEPS = (3, 14)
"""Steps of the two rows' noise levels."""


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict; all layers of a prior have the rotary frequencies of the first."""
    state = own_weights(shapes)
    rotary = [name for name in state if name.endswith("rotary_emb.freqs")]
    return state | dict.fromkeys(rotary, state.get("causal_transformer.layers.0.0.rotary_emb.freqs"))


def prior_inputs() -> dict[str, Tensor]:
    """Unit embeddings of two captions and tokens of them (2 and 4), images' embeddings of variance 1, noise to add to
    them, an earlier estimate, and noise of sampling."""
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    return {
        "x0": F.normalize(numbers("x0", (2, DIM)), dim=-1) * DIM**0.5,
        "noise": numbers("noise", (2, DIM)),
        "text_embed": F.normalize(numbers("text_embed", (2, DIM)), dim=-1),
        "text": numbers("text", (2, 4, DIM)) * mask[..., None],
        "mask": mask,
        "estimate": numbers("estimate", (2, DIM)),
        "step_noise": numbers("step_noise", (2, DIM)),
    }


def decoder_inputs() -> dict[str, Tensor]:
    """Two images of 8 px in [-1, 1], noise to add, unit embeddings of two images, tokens of captions (2 and 4),
    low-resolution images of half the side, an earlier estimate, and noise of sampling."""
    given, shape = prior_inputs(), (2, 3, 8, 8)
    x0 = numbers("x0", shape).clamp(-1, 1)
    return {
        "x0": x0,
        "noise": numbers("noise", shape),
        "image_embed": F.normalize(numbers("image_embed", (2, DIM)), dim=-1),
        "text": given["text"],
        "mask": given["mask"],
        "low_res": x0[..., ::2, ::2],
        "estimate": numbers("estimate", shape).clamp(-1, 1),
        "step_noise": numbers("step_noise", shape),
    }
