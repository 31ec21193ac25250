"""The Hybrid UNet: the layout of imagen-pytorch, PaddleFleetX Imagen, MinImagen and DALLE2-pytorch's decoder.

A level is a ResBlock, more of them (one kind reads the conditions, one has a global-context gate), then a transformer
block. Between levels pixels are shuffled into channels and back. Conditions are tokens; see `hybrid.conditioning`.
"""

import torch
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.hybrid.blocks import (
    CrossEmbed,
    FeatureCombiner,
    GlobalContext,
    HybridLevel,
    TextAttention,
    TransformerBlock,
    TwoConvs,
)
from imagen_core.models.hybrid.conditioning import HybridInputs
from imagen_core.models.hybrid.config import HybridUNetSettings, LevelAttention
from imagen_core.models.layers.context import Context
from imagen_core.models.layers.resblock import RepeatConv, ResBlock
from imagen_core.models.unet.block import Block, of_type
from imagen_core.models.unet.inputs import check_sides, concatenate_images, run_block


class HybridUNet(nn.Module):
    """Predicts from a noisy image, its noise level and the conditioning. The objective decides what it predicts."""

    def __init__(self, config: HybridUNetSettings):
        super().__init__()
        self.config = config
        widths = [config.dim, *(config.dim * mult for mult in config.dim_mults)]
        self.inputs = HybridInputs(config)
        self.conv_in = CrossEmbed(config.input_channels, config.dim, config.init_kernels)
        self.first = None
        if config.initial_res_block:
            self.first = Block(self._res(config.dim, config.dim, gate=config.final_global_context), None)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        last = len(config.dim_mults) - 1
        for level in range(last + 1):
            narrow, wide = widths[level], widths[level + 1]
            if config.memory_efficient:
                after = nn.Conv2d(wide, wide, 1) if config.convs_after else None
                self.down.append(self._level(level, wide, before=self._downsample(narrow, wide), after=after))
            else:
                after = self._downsample(narrow, wide) if level < last else self._widen(narrow, wide)
                self.down.append(self._level(level, narrow, after=after))
            upsamples = level > 0 or config.memory_efficient
            self.up.insert(
                0,
                self._level(
                    level,
                    wide,
                    skip_width=wide if config.memory_efficient else narrow,
                    after=self._upsample(wide, narrow) if upsamples else None,
                ),
            )
        middle = widths[-1]
        self.middle = nn.ModuleList([self._middle_block(middle)])
        if config.middle_attention:
            self.middle.append(
                TransformerBlock(
                    middle,
                    config,
                    level=last,
                    attend_to_conditions=False,
                    feed_forward=config.middle_feed_forward,
                    depth=config.middle_transformer_depth,
                )
            )
        self.middle.append(self._middle_block(middle))
        self.combiner = None
        if config.combine_up_features:
            self.combiner = FeatureCombiner(widths[:0:-1], config)
        joined = config.dim if config.memory_efficient else widths[1]
        joined += config.dim * (config.init_residual + (last + 1) * config.combine_up_features)
        self.final = Block(self._res(joined, config.dim, gate=config.final_global_context), None)
        extra = config.in_channels if config.low_res and config.low_res_at_end else 0
        kernel = config.out_kernel_size
        self.conv_out = nn.Conv2d(config.dim + extra, config.out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """x (b, in_channels, h, w), c_noise (b,) -> (b, out_channels, h, w).

        Raises:
            ValueError: the levels do not divide the sides, a condition is missing, or a caption is longer than
                max_text_tokens.
        """
        check_sides(x, self.config.sides_divisor)
        context, middle_context = self.inputs(c_noise, conditioning)
        first = h = self.conv_in(concatenate_images(x, conditioning, self.config))
        if self.first is not None:
            h = self._run(self.first, h, context)
        skips: list[Tensor] = []
        for level in of_type(self.down, HybridLevel):
            h = h if level.before is None else level.before(h)
            h = self._run(level.first, h, context)
            for block in level.blocks:
                h = self._run(block, h, context)
                skips.append(h)
            h = h if level.transformer is None else self._run(level.transformer, h, context)
            skips.append(h)
            h = h if level.after is None else level.after(h)
        for block in self.middle:
            h = self._run(block, h, middle_context)
        up: list[Tensor] = []
        scale = 0.5**0.5 if self.config.scale_skips else 1.0
        for level in of_type(self.up, HybridLevel):
            for block in (level.first, *level.blocks):
                h = self._run(block, torch.cat([h, scale * skips.pop()], dim=1), context)
            h = h if level.transformer is None else self._run(level.transformer, h, context)
            up.append(h)
            h = h if level.after is None else level.after(h)
        joined = [h]
        if self.combiner is not None:
            joined += self.combiner(up, h.shape[2:])
        if self.config.init_residual:
            joined.append(first)
        h = torch.cat(joined, dim=1) if len(joined) > 1 else h
        h = self._run(self.final, h, context)
        if self.config.low_res and self.config.low_res_at_end and conditioning.low_res is not None:
            h = torch.cat([h, conditioning.low_res.to(h.dtype)], dim=1)
        return self.conv_out(h)

    def _run(self, block: nn.Module, x: Tensor, context: Context) -> Tensor:
        return run_block(block, x, context, recompute=self.config.activation_checkpointing)

    def _level(
        self,
        level: int,
        width: int,
        *,
        skip_width: int = 0,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> HybridLevel:
        config = self.config
        text, attention = config.cross_attention_levels[level], config.attention_levels[level]
        first_reads = config.conditions_in == "first_block"
        channels = width + skip_width

        def block(*, reads: bool, gate: bool = False) -> Block:
            return Block(self._res(channels, width, level=level, text=text if reads else False, gate=gate), None)

        transformer = None
        if attention:
            transformer = TransformerBlock(
                width,
                config,
                level=level,
                attend_to_conditions=config.attend_to_conditions,
                depth=config.depth(level),
                linear=attention == "linear",
            )
        return HybridLevel(
            before=before,
            first=block(reads=first_reads or skip_width > 0),
            blocks=[
                block(reads=not first_reads, gate=config.global_context) for _ in range(config.num_res_blocks[level])
            ],
            transformer=transformer,
            after=after,
        )

    def _middle_block(self, width: int) -> Block:
        return Block(self._res(width, width, text=True, middle=True), None)

    def _res(
        self,
        in_channels: int,
        out_channels: int,
        *,
        level: int = -1,
        text: LevelAttention = False,
        gate: bool = False,
        middle: bool = False,
    ) -> ResBlock:
        config = self.config
        return ResBlock(
            in_channels,
            out_channels,
            config.time_dim,
            dropout=config.dropout,
            num_groups=8,
            norm=config.norm,
            zero_init=False,
            conv_first=config.res_block == "conv_first",
            weight_standardization=config.weight_standardization,
            text_attention=TextAttention(out_channels, config, level=level, linear=text == "linear", middle=middle)
            if text
            else None,
            gate=GlobalContext(out_channels) if gate else None,
        )

    def _downsample(self, width: int, out_width: int) -> nn.Module:
        if self.config.downsample == "pixel_unshuffle":
            return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out_width, 1))
        if self.config.downsample == "cross_embed":
            return CrossEmbed(width, out_width, kernels=(2, 4), stride=2)
        return nn.Conv2d(width, out_width, 4, stride=2, padding=1)

    def _widen(self, width: int, out_width: int) -> nn.Module:
        if self.config.deepest_widen == "conv":
            return nn.Conv2d(width, out_width, 1)
        return TwoConvs(width, out_width)

    def _upsample(self, width: int, out_width: int) -> nn.Module:
        if self.config.upsample == "pixel_shuffle":
            return nn.Sequential(nn.Conv2d(width, 4 * out_width, 1), nn.SiLU(), nn.PixelShuffle(2))
        return RepeatConv(width, out_width)


class HybridUNetConfig(HybridUNetSettings):
    """A Hybrid UNet."""

    def build(self) -> HybridUNet:
        """A new model with random weights."""
        return HybridUNet(self)
