"""DeepFloyd IF's UNets of stages I and II, as options of the Regular family.

I-XL and II-L are those of their config.json, and have as many parameters as their files. Those of I-M and I-L were not
at hand: these have I-XL's layout at the width that gives the published number. II-M is not known.
"""

from imagen_core.models.presets.base import Preset
from imagen_core.models.unet.regular import RegularUNetConfig

_DIVISOR = 1 / 0.7071  # as published, instead of the square root of 2


def _if(size_px: int, channels: int, mult: tuple[int, ...], **more: object) -> RegularUNetConfig:
    """A UNet that reads 77 tokens of T5-XXL, padding included, and predicts noise and variance."""
    return RegularUNetConfig.model_validate(
        {
            "image_size_px": size_px,
            "embed_dim": channels,
            "channel_mult": mult,
            "num_res_blocks": 3,
            "attention_resolutions": (32, 16, 8),
            "shared_norm": True,
            "text_dim": 4096,
            "cond_dim": channels * mult[-1],
            "padded_tokens": 77,
            "dropped_caption": "empty_caption",
            "pooling": "multihead",
            "out_channels": 6,
            "resblock_updown": True,
            "activation": "gelu",
            **more,
        }
    )


def _stage_2(channels: int, mult: tuple[int, ...], blocks: tuple[int, ...]) -> RegularUNetConfig:
    return _if(
        256,
        channels,
        mult,
        num_res_blocks=blocks,
        attention_resolutions=(32, 16),
        low_res=True,
        low_res_noise=True,
        time_embed_dim=channels * mult[-1],
        block_divisor=_DIVISOR,
        middle_divisor=_DIVISOR,
    )


_NAME = "DeepFloyd IF"

DEEPFLOYD_PRESETS: dict[str, Preset] = {
    "if_i_m": Preset(_if(64, 192, (1, 2, 3, 4)), 371_605_830, f"{_NAME}-I-M (by its label, 400M)"),
    "if_i_l": Preset(_if(64, 320, (1, 2, 3, 4)), 935_365_830, f"{_NAME}-I-L (by its label, 900M)"),
    "if_i_xl": Preset(_if(64, 704, (1, 2, 3, 4)), 4_304_695_110, f"{_NAME}-I-XL (4.3B)"),
    "if_ii_l": Preset(
        _stage_2(160, (1, 2, 4, 6, 8), (2, 2, 3, 5, 5)), 1_243_277_190, f"{_NAME}-II-L, to 256 px (1.2B)"
    ),
}
"""UNets of DeepFloyd IF by name, with T5-XXL's 4096-wide text."""
