"""Conditions before the first block of a patch transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.conditioning.image_embed import ImageEmbedConditioning, LabelEmbedding
from imagen_core.models.conditioning.text import attended_text
from imagen_core.models.conditioning.text_embed import TextEmbedConditioning
from imagen_core.models.layers.noise_embedding import NoiseEmbedding, SinusoidalEmbedding
from imagen_core.models.layers.rms_norm import RMSNorm
from imagen_core.models.transformer.config import TransformerSettings
from imagen_core.models.unet.inputs import low_res_noise

_SIDE_SINUSOIDS = 128


class TokenInputs(nn.Module):
    """Noise levels, label, caption and image embedding -> the time vector, and the tokens to attend to."""

    def __init__(self, config: TransformerSettings):
        super().__init__()
        self.config = config
        dim, attends = config.dim, config.attention_type != "self"

        def level() -> NoiseEmbedding:
            return NoiseEmbedding(SinusoidalEmbedding(config.time_sinusoids), dim)

        self.time = level()
        self.low_res_time = level() if config.low_res_noise else None
        self.size = SizeEmbedding(dim) if config.size_vector else None
        self.labels = (
            None if config.num_classes is None else LabelEmbedding(config.num_classes, dim, learned_null=True)
        )
        self.text_embed = None
        if config.text_embed_dim is not None:
            self.text_embed = TextEmbedConditioning(config.text_embed_dim, dim)
        self.image_embed = None
        if config.image_embed_dim is not None:
            num_tokens = config.num_image_tokens if attends else 0
            self.image_embed = ImageEmbedConditioning(config.image_embed_dim, dim, dim, num_tokens)
        self.text_layers = config.build_text_layers()
        self.text_norm = self.text = None
        if config.text_width is not None:
            self.text_norm = RMSNorm(config.text_width) if config.text_norm else None
            self.text = nn.Linear(config.text_width, dim)

    def time_vector(
        self, c_noise: Tensor, conditioning: Conditioning, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """c_noise (b,), and height and width of the images in pixels -> the time vector (b, dim), not activated, and
        that of the labels alone, which it contains; None without labels.

        Raises:
            ValueError: a condition that the model reads is missing.
        """
        factor = self.config.time_factor
        time = self.time(c_noise * factor)
        if self.low_res_time is not None:
            time = time + self.low_res_time(low_res_noise(conditioning) * factor)
        if self.size is not None:
            time = time + self.size(shape)
        label = None if self.labels is None else self.labels(conditioning)
        if label is not None:
            time = time + label
        if self.text_embed is not None:
            time = time + self.text_embed(conditioning)
        return time, label

    def tokens(self, conditioning: Conditioning) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the tokens to attend to (b, l, dim), their mask bool (b, l), None if all are real, and the image
        embedding's share of the time vector (b, dim); each None where the model has no such input.

        Raises:
            ValueError: a condition that the model reads is missing.
        """
        tokens = mask = vector = None
        if self.text is not None and self.config.text_width is not None:
            if self.text_layers is not None:
                conditioning = self.text_layers(conditioning)
            text, mask = attended_text(conditioning, self.config.text_width, self.config.dropped_caption)
            text = text.to(self.text.weight.dtype)
            tokens = self.text(text if self.text_norm is None else self.text_norm(text))
        if self.image_embed is not None:
            more, vector = self.image_embed(conditioning)
            if more is not None and tokens is not None and mask is not None:
                tokens = torch.cat([tokens, more.to(tokens.dtype)], dim=1)
                mask = F.pad(mask, (0, more.shape[1]), value=True)
            elif more is not None:
                tokens = more
        return tokens, mask, vector


class SizeEmbedding(nn.Module):
    """Height and width in pixels, as sinusoids through two linear layers: a vector."""

    def __init__(self, dim: int):
        super().__init__()
        self.embedding = SinusoidalEmbedding(_SIDE_SINUSOIDS)
        self.hidden = nn.Linear(2 * _SIDE_SINUSOIDS, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, shape: tuple[int, int]) -> Tensor:
        """(height, width) -> (1, dim)."""
        weight = self.hidden.weight
        sides = torch.tensor(shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        return self.out(F.silu(self.hidden(self.embedding(sides).flatten()[None].to(weight.dtype))))
