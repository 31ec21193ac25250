"""Conditions and images before the first block of a UNet; images before that of a transformer too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.conditioning.image_embed import ImageEmbedConditioning, LabelEmbedding
from imagen_core.models.conditioning.text import TextConditioning
from imagen_core.models.conditioning.text_embed import TextEmbedConditioning
from imagen_core.models.conditioning.transcription import TranscriptionEncoder
from imagen_core.models.layers.activation import Activation, activate
from imagen_core.models.layers.context import Context
from imagen_core.models.layers.noise_embedding import NoiseEmbedding, level_embedding
from imagen_core.models.unet.base import AttentionUNetConfig, UNetBaseConfig


class Inputs(nn.Module):
    """Noise level, caption, transcription, image embedding, class and low-resolution noise level -> `Context`."""

    def __init__(self, config: AttentionUNetConfig, cond_dim: int, *, attends: bool):
        """`attends`: whether the model attends to conditions, which become tokens of width `cond_dim`."""
        super().__init__()
        time_dim = config.time_dim
        self.activation: Activation = config.activation
        self.activations = config.time_activations

        def time_mlp() -> NoiseEmbedding:
            embedding = level_embedding(config.embed_dim, config.learned_fourier_frequencies)
            return NoiseEmbedding(embedding, time_dim, config.activation)

        self.time = time_mlp()
        self.low_res_time = time_mlp() if config.low_res_noise else None
        self.text_layers = config.build_text_layers()
        self.text = None
        if config.text_width is not None:
            self.text = TextConditioning(
                config.text_width,
                cond_dim,
                time_dim,
                pooling=config.pooling,
                pooling_heads=config.pooling_heads,
                null_token=config.null_token,
                dropped_caption=config.dropped_caption,
                padded_tokens=config.padded_tokens,
                attended=attends,
            )
        self.image_embed = None
        if config.image_embed_dim is not None:
            num_tokens = config.num_image_tokens if attends else 0
            self.image_embed = ImageEmbedConditioning(config.image_embed_dim, cond_dim, time_dim, num_tokens)
        self.text_embed = None
        if config.text_embed_dim is not None:
            self.text_embed = TextEmbedConditioning(config.text_embed_dim, time_dim)
        self.labels = None if config.num_classes is None else LabelEmbedding(config.num_classes, time_dim)
        self.transcription = None
        if config.transcription is not None:
            self.transcription = TranscriptionEncoder(config.transcription, time_dim)

    def forward(self, c_noise: Tensor, conditioning: Conditioning) -> Context:
        """c_noise float (b,), at least float32 where it is a step index -> what every block reads.

        Raises:
            ValueError: a condition that the model reads is missing.
        """
        vectors, tokens, mask = conditioning.remembered(self, lambda: self._of_conditions(conditioning))
        time = self.time(c_noise)
        for vector in vectors:
            time = time + vector
        for _ in range(self.activations):
            time = activate(time, self.activation)
        characters = (None, None) if self.transcription is None else self.transcription(conditioning, time)
        return Context(time, tokens, mask, *characters)

    def _of_conditions(self, conditioning: Conditioning) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """What does not depend on the noise level: vectors (b, time_dim) to add to its own, tokens and their mask."""
        if self.text_layers is not None:
            conditioning = self.text_layers(conditioning)
        vectors: list[Tensor] = []
        if self.low_res_time is not None:
            vectors.append(self.low_res_time(low_res_noise(conditioning)))
        if self.labels is not None:
            vectors.append(self.labels(conditioning))
        if self.text_embed is not None:
            vectors.append(self.text_embed(conditioning))
        tokens = mask = None
        if self.text is not None:
            tokens, mask, vector = self.text(conditioning)
            vectors.append(vector)
        if self.image_embed is not None:
            more, vector = self.image_embed(conditioning)
            vectors.append(vector)
            if more is not None and tokens is not None and mask is not None:
                tokens, mask = torch.cat([tokens, more], dim=1), F.pad(mask, (0, more.shape[1]), value=True)
            elif more is not None:
                tokens = more
        return vectors, tokens, mask


def low_res_noise(conditioning: Conditioning) -> Tensor:
    """c_noise (b,) of the low-resolution image.

    Raises:
        ValueError: it is missing.
    """
    if conditioning.low_res_noise is None:
        raise ValueError("conditioning.low_res_noise: this model reads the noise level of the low_res image")
    return conditioning.low_res_noise


def concatenate_images(x: Tensor, conditioning: Conditioning, config: UNetBaseConfig) -> Tensor:
    """Concatenates the noisy image (b, in_channels, h, w) with the other images that the first convolution reads.

    Returns:
        (b, input_channels, h, w), in the dtype of x.

    Raises:
        ValueError: an image is missing or of another size.
    """
    joined = [x]
    if config.low_res:
        joined.append(_image("low_res", conditioning.low_res, x, config.in_channels))
    if config.self_conditioning:
        estimate = torch.zeros_like(x) if conditioning.estimate is None else conditioning.estimate
        joined.append(_image("estimate", estimate, x, config.in_channels))
    if config.condition_channels:
        joined.append(_image("images", conditioning.images, x, config.condition_channels))
    return torch.cat(joined, dim=1) if len(joined) > 1 else x


def _image(name: str, image: Tensor | None, x: Tensor, channels: int) -> Tensor:
    wanted = (x.shape[0], channels, *x.shape[2:])
    if image is None or image.shape != wanted:
        found = None if image is None else tuple(image.shape)
        raise ValueError(f"conditioning.{name}: this model reads an image of {wanted} (got {found})")
    return image.to(x.dtype)


def check_sides(x: Tensor, divisor: int) -> None:
    """Raises ValueError unless both sides of (b, c, h, w) are multiples of `divisor`."""
    if x.shape[-1] % divisor or x.shape[-2] % divisor:
        raise ValueError(f"this model needs sides that are multiples of {divisor} px (got {tuple(x.shape[-2:])})")


def run_block(block: nn.Module, x: Tensor, context: object, *, recompute: bool) -> Tensor:
    """Runs a block; `recompute` keeps only its input for the backward pass (activation checkpointing)."""
    if recompute and torch.is_grad_enabled():
        result = checkpoint(block, x, context, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result
    return block(x, context)
