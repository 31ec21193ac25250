"""ADM's UNets as Regular UNets: settings and weights of guided-diffusion and improved-diffusion.

What attention computes for all heads at once is ordered by head in their older models, and by query, key and value
with use_new_attention_order; here it is the latter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from imagen_core.conversion.nemo_unet import regular_place
from imagen_core.conversion.weights import match_parameters
from imagen_core.models.unet.regular import RegularUNetConfig

NUM_CLASSES = 1000
"""Classes of every model that reads them."""
FIRST, LAST = "input_blocks.0.0.weight", "out.2.weight"
"""Names of the kernels of the first and the last convolution."""
_RULES = (  # their names -> names here; each is applied once, in this order
    (r"^time_embed\.0\.", "inputs.time.hidden."),
    (r"^time_embed\.2\.", "inputs.time.out."),
    (r"^label_emb\.", "inputs.labels.embedding."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^middle_block\.0\.", "middle.0.layer."),
    (r"^middle_block\.1\.", "middle.0.attention."),
    (r"^middle_block\.2\.", "middle.1.layer."),
    (r"^out\.0\.", "norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"\.resample\.layer\.op\.", ".resample.layer."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".skip."),
    (r"\.attention\.(qkv|proj_out)\.", r".attention.attention.\1."),
    (r"\.proj_out\.", ".to_out."),
)


def unet_config(settings: Mapping[str, Any], *, low_res: bool) -> RegularUNetConfig:
    """The configuration of a UNet like theirs.

    Args:
        settings: as `adm.settings_of_flags` gives them; of nostalgebraist's models also monochrome, up_num_heads and
            middle_num_heads.
        low_res: whether it upsamples images.
    Raises:
        ValueError: a setting has no counterpart here.
    """
    by_width = settings["num_head_channels"] != -1
    heads, up_heads = settings["num_heads"], settings["num_heads_upsample"]
    channels = 1 if settings.get("monochrome") else 3
    return RegularUNetConfig.model_validate(
        {
            "image_size_px": settings["image_size"],
            "text_dim": None,
            "num_classes": NUM_CLASSES if settings["class_cond"] else None,
            "in_channels": channels,
            "out_channels": channels * (1 + settings["learn_sigma"]),
            "low_res": low_res,
            "dropout": settings["dropout"],
            "activation_checkpointing": settings["use_checkpoint"],
            "embed_dim": settings["num_channels"],
            "channel_mult": settings["channel_mult"],
            "num_res_blocks": settings["num_res_blocks"],
            "attention_type": "self",
            "attention_resolutions": attending_sides(
                settings["image_size"], settings["attention_resolutions"], len(settings["channel_mult"])
            ),
            "head_dim": settings["num_head_channels"] if by_width else 64,
            "num_heads": None if by_width else heads,
            "up_num_heads": settings.get("up_num_heads") if by_width or up_heads in (-1, heads) else up_heads,
            "middle_num_heads": settings.get("middle_num_heads"),
            "scale_shift": settings["use_scale_shift_norm"],
            "resblock_updown": settings["resblock_updown"],
            "upsample": "repeat_conv",
        }
    )


def attending_sides(size_px: int, resolutions: Sequence[int], levels: int) -> list[int]:
    """Sides of the levels with attention: they compare by how much the image's side is divided, rounded down."""
    divisors = {size_px // side for side in resolutions if side > 0}
    return [size_px // 2**level for level in range(levels) if 2**level in divisors]


def unet_weights(
    state: Mapping[str, Tensor], config: RegularUNetConfig, *, new_attention_order: bool
) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, in float32, from a state dict of their UNet.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    return match_parameters(_named(state, config, new_attention_order), config)


def _named(
    state: Mapping[str, Tensor], config: RegularUNetConfig, new_order: bool
) -> Iterator[tuple[str, str, Tensor]]:
    for full, values in state.items():
        name = convert_name(full, config)
        if ".qkv." not in name:
            yield full, name, values
            continue
        if not new_order:
            values = _by_kind(values, _heads(name, config, len(values) // 3))
        q, kv = values.tensor_split([len(values) // 3])
        yield full, name.replace("qkv", "to_q"), q
        yield full, name.replace("qkv", "to_kv"), kv


def convert_name(name: str, config: RegularUNetConfig) -> str:
    """The name here of a tensor of their UNet; an unknown one keeps its name."""
    name = regular_place(name, config)
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _heads(name: str, config: RegularUNetConfig, width: int) -> int:
    part = {"up": config.up_num_heads, "middle": config.middle_num_heads}.get(name.partition(".")[0])
    return max(1, width // config.head_width(width, part))


def _by_kind(values: Tensor, heads: int) -> Tensor:
    """(3 c, ...), query, key and value of each head -> queries of all heads, then keys, then values."""
    if len(values) % (3 * heads):
        return values  # of other settings, as its shape will tell
    return values.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
