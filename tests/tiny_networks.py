"""Tiny networks of each family, as settings without the width of the text."""

from typing import Any

EFFICIENT: dict[str, Any] = {
    "family": "efficient",
    "image_size_px": 16,
    "embed_dim": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "attention_levels": [False, True],
    "head_dim": 16,
    "low_res": False,
}
HYBRID: dict[str, Any] = {
    "family": "hybrid",
    "image_size_px": 16,
    "dim": 16,
    "dim_mults": [1, 2],
    "num_res_blocks": [1, 1],
    "attention_levels": [False, True],
    "cross_attention_levels": [False, True],
    "head_dim": 8,
    "num_heads": 2,
}
TRANSFORMER: dict[str, Any] = {
    "family": "transformer",
    "image_size_px": 16,
    "patch_px": 4,
    "bottleneck_dim": 12,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
}
