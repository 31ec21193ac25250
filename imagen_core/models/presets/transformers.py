"""Published patch transformers over pixels."""

from imagen_core.models.presets.base import Preset
from imagen_core.models.transformer.model import TransformerConfig


def _jit(
    patch_px: int, depth: int, dim: int, *, bottleneck: int, start: int, heads: int = 16, dropout: float = 0.0
) -> TransformerConfig:
    """JiT (Li and He 2025, arXiv 2511.13720, table 9) on ImageNet: 16 x 16 patches of an image of 256 or 512 px."""
    return TransformerConfig(
        image_size_px=16 * patch_px,
        patch_px=patch_px,
        bottleneck_dim=bottleneck,
        dim=dim,
        depth=depth,
        num_heads=heads,
        bias=True,
        attention_type="self",
        text_dim=None,
        num_classes=1000,
        num_class_tokens=32,
        class_tokens_from=start,
        fixed_positions=True,
        position_scaling="area",
        dropout=dropout,
    )


def _prx(image_size_px: int, patch_px: int, depth: int, dim: int, **more: object) -> TransformerConfig:
    """PRX's transformer: captions as further keys and values. It names no size; that of its images is given."""
    return TransformerConfig.model_validate(
        {
            "image_size_px": image_size_px,
            "patch_px": patch_px,
            "bottleneck_bias": True,
            "dim": dim,
            "depth": depth,
            "num_heads": 28,
            "mlp_ratio": 3.5,
            "mlp_activation": "geglu_tanh",
            "norm": "layer",
            "text_norm": False,
            "dropped_caption": "empty_caption",
            "time_factor": 1000.0,
            **more,
        }
    )


_TRAINED = "trained parameters: its fixed positions are computed"
_B, _L = {"heads": 12, "bottleneck": 128, "start": 4}, {"bottleneck": 128, "start": 8}
_H = {"bottleneck": 256, "start": 10, "dropout": 0.2}

TRANSFORMER_PRESETS: dict[str, Preset] = {
    "jit_b_16": Preset(_jit(16, 12, 768, **_B), 131_123_712, f"JiT-B/16, ImageNet 256; {_TRAINED}"),
    "jit_b_32": Preset(_jit(32, 12, 768, **_B), 133_190_400, f"JiT-B/32, ImageNet 512; {_TRAINED}"),
    "jit_l_16": Preset(_jit(16, 24, 1024, **_L), 458_877_664, f"JiT-L/16, ImageNet 256; {_TRAINED}"),
    "jit_l_32": Preset(_jit(32, 24, 1024, **_L), 461_534_176, f"JiT-L/32, ImageNet 512; {_TRAINED}"),
    "jit_h_16": Preset(_jit(16, 32, 1280, **_H), 952_514_368, f"JiT-H/16, ImageNet 256; {_TRAINED}"),
    "jit_h_32": Preset(_jit(32, 32, 1280, **_H), 956_055_616, f"JiT-H/32, ImageNet 512; {_TRAINED}"),
    "jit_g_16": Preset(_jit(16, 40, 1664, **_H), 2_007_130_000, f"JiT-G/16 of the paper, ImageNet 256; {_TRAINED}"),
    "jit_g_32": Preset(_jit(32, 40, 1664, **_H), 2_011_555_984, f"JiT-G/32 of the paper, ImageNet 512; {_TRAINED}"),
    "prx_pixel": Preset(
        _prx(1024, 16, 24, 3584, bottleneck_dim=768, text_dim=2048, size_vector=True),
        7_003_535_872,
        "PRX's pixel model prxpixel-t2i (published as 7B), Qwen3-VL's 2048-wide text",
    ),
    "prx_jit_32": Preset(
        _prx(1024, 32, 16, 1792, bottleneck_dim=256, text_dim=2304),
        1_177_215_744,
        "PRX's prx_jit_32_small (published as 1.24B), T5-Gemma's 2304-wide text",
    ),
}
"""Patch transformers by name."""
