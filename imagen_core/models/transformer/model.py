"""A transformer over patches of pixels, without an autoencoder: the layout of JiT and of PRX's pixel model.

Li and He 2025 (arXiv 2511.13720): patches of raw pixels through a bottleneck, rotary positions in two dimensions,
SwiGLU, root mean square norms, adaptive norms for the noise level, labels as tokens. PRX (Photoroom 2025): captions as
further keys and values of the same attention.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.layers.attention import flatten_pixels, unflatten_pixels, zero_
from imagen_core.models.layers.positions import grid_angles, grid_sinusoids
from imagen_core.models.transformer.blocks import (
    NUM_MODULATIONS,
    PatchBlock,
    TokenContext,
    make_norm,
    modulate,
)
from imagen_core.models.transformer.config import TransformerSettings
from imagen_core.models.transformer.inputs import TokenInputs
from imagen_core.models.unet.inputs import check_sides, concatenate_images, run_block

_STD = 0.02


class PatchTransformer(nn.Module):
    """Predicts from a noisy image, its noise level and the conditioning. The objective decides what it predicts."""

    def __init__(self, config: TransformerSettings):
        super().__init__()
        self.config = config
        dim, area = config.dim, config.patch_px**2
        self.inputs = TokenInputs(config)
        patch_dim = config.input_channels * area
        if config.bottleneck_dim is None:
            self.patch_in: nn.Module = nn.Linear(patch_dim, dim)
        else:
            narrow = nn.Linear(patch_dim, config.bottleneck_dim, bias=config.bottleneck_bias)
            self.patch_in = nn.Sequential(narrow, nn.Linear(config.bottleneck_dim, dim))
        self.class_tokens = None
        if config.has_class_tokens:
            self.class_tokens = nn.Parameter(torch.randn(config.num_class_tokens, dim) * _STD)
        self.modulation = nn.Linear(dim, NUM_MODULATIONS * dim) if config.time == "shared" else None
        quarter = config.depth // 4
        self.blocks = nn.ModuleList(
            [
                # Dropout in the middle half, as in JiT.
                PatchBlock(config, dropout=config.dropout if quarter <= number < 3 * quarter else 0.0)
                for number in range(config.depth)
            ]
        )
        self.norm_out = make_norm(config)
        self.modulation_out = None if config.time == "token" else nn.Linear(dim, 2 * dim)
        self.patch_out = nn.Linear(dim, config.out_channels * area)
        self._initialize()

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, in_channels, h, w), c_noise (b,) -> (b, out_channels, h, w).

        Raises:
            ValueError: patch_px does not divide the sides, or a condition is missing.
        """
        config = self.config
        check_sides(x, config.patch_px)
        patches = F.pixel_unshuffle(concatenate_images(x, conditioning, config), config.patch_px)
        time, label = self.inputs.time_vector(c_noise, conditioning, (x.shape[-2], x.shape[-1]))
        context_tokens, mask, vector = conditioning.remembered(self.inputs, lambda: self.inputs.tokens(conditioning))
        if vector is not None:
            time = time + vector
        tokens = self.patch_in(flatten_pixels(patches))
        angles, tokens = self._place(patches, tokens)
        activated = F.silu(time)
        per_block = None if config.time == "token" else activated
        if self.modulation is not None:
            per_block = self.modulation(activated)
        context = TokenContext(per_block, angles.cos(), angles.sin(), context_tokens, mask)
        num_patches = tokens.shape[1]
        if config.time == "token":
            tokens, context = _with_prefix(time[:, None], tokens, context)
        for number, block in enumerate(self.blocks):
            if self.class_tokens is not None and label is not None and number == config.class_tokens_from:
                prefix = label[:, None] + self.class_tokens.to(label.dtype)
                tokens, context = _with_prefix(prefix, tokens, context)
            tokens = run_block(block, tokens, context, recompute=config.activation_checkpointing)
        tokens = self.norm_out(tokens[:, -num_patches:])
        if self.modulation_out is not None:
            shift, scale = self.modulation_out(activated)[:, None].chunk(2, dim=-1)
            tokens = modulate(tokens, shift, scale)
        return F.pixel_shuffle(unflatten_pixels(self.patch_out(tokens), patches), config.patch_px)

    def _place(self, patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """patches (b, c, rows, columns) and their tokens (b, n, dim) -> the angles of the rotary positions
        (n, head_dim / 2), at least float32, and the tokens, with fixed positions where the model has them."""
        config = self.config
        num_rows, num_columns = patches.shape[-2:]
        scale = 1.0
        if config.position_scaling == "area":
            scale = config.image_size_px / config.patch_px / (num_rows * num_columns) ** 0.5
        exact = torch.promote_types(patches.dtype, torch.float32)
        rows, columns = (
            torch.arange(count, device=patches.device, dtype=exact) * scale for count in (num_rows, num_columns)
        )
        rows, columns = rows.repeat_interleave(num_columns), columns.repeat(num_rows)
        if config.fixed_positions:
            tokens = tokens + grid_sinusoids(rows, columns, config.dim).to(tokens.dtype)
        return grid_angles(rows, columns, config.dim // config.num_heads, config.rotary_theta), tokens

    def _initialize(self) -> None:
        """As in JiT: Glorot's uniform weights, zero in what modulates, gates, and ends the network."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_STD)
        for level in (self.inputs.time, self.inputs.low_res_time):
            if level is not None:
                nn.init.normal_(level.hidden.weight, std=_STD)
                nn.init.normal_(level.out.weight, std=_STD)
        for module in self.modules():
            if isinstance(module, PatchBlock):
                if module.modulation is not None:
                    zero_(module.modulation)
                elif module.offset is None:
                    zero_(module.attention.to_out)
                    zero_(module.contract)
                if module.cross_attention is not None:
                    zero_(module.cross_attention.to_out)
        for layer in (self.modulation, self.modulation_out, self.patch_out):
            if layer is not None:
                zero_(layer)


def _with_prefix(prefix: Tensor, tokens: Tensor, context: TokenContext) -> tuple[Tensor, TokenContext]:
    """Puts tokens without a place, (b, p, dim), before the others."""
    count = prefix.shape[1]
    cos, sin = F.pad(context.cos, (0, 0, count, 0), value=1.0), F.pad(context.sin, (0, 0, count, 0))
    return torch.cat([prefix.to(tokens.dtype), tokens], dim=1), replace(context, cos=cos, sin=sin)


class TransformerConfig(TransformerSettings):
    """A patch transformer."""

    def build(self) -> PatchTransformer:
        """A new model with random weights."""
        return PatchTransformer(self)
