"""NeMo Imagen's UNets as Regular and Efficient UNets: settings and weights (nemo_toolkit 1.23.0, nets.py)."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from imagen_core.conversion.weights import match_parameters
from imagen_core.models.unet.efficient import EfficientUNetConfig
from imagen_core.models.unet.regular import RegularUNetConfig

_COMMON = {
    "channels": 3,
    "num_attn_heads": None,  # 4 or 8, used if per_head_channels is -1
    "per_head_channels": 64,
    "attention_type": "fused",
    "feature_pooling_type": "attention",
    "learned_sinu_pos_emb_dim": 16,
    "use_null_token": False,
    "init_conv_kernel_size": 3,
    "gradient_checkpointing": False,
    "scale_shift_norm": True,
    "stable_attention": True,
    "flash_attention": False,
}
_REGULAR: dict[str, Any] = _COMMON | {
    "num_res_blocks": 3,
    "channel_mult": (1, 2, 3, 4),
    "num_attn_heads": 4,
    "cond_dim": 512,
    "attention_resolutions": (8, 16, 32),
    "dropout": False,
    "resblock_updown": False,
    "resample_with_conv": True,
    "low_res_cond": False,
}
_EFFICIENT: dict[str, Any] = _COMMON | {
    "channel_mult": (1, 1, 2, 4, 8),
    "num_attn_heads": 8,
    "atnn_enabled_at": (0, 0, 0, 0, 1),
    "stride": 2,
    "num_resblocks": (1, 2, 4, 8, 8),
    "skip_connection_scaling": False,
}
_ONLY = {  # settings with one supported value, and why
    "init_conv_kernel_size": (3, "NeMo's last convolution would have that kernel too"),
}
_ONLY_EFFICIENT = {
    "stride": (2, "resolutions are halved from level to level"),
}
_RULES = (  # NeMo's names -> names here; each is applied once, in this order
    (r"^null_text_embedding$", "inputs.text.null_token"),
    (r"^time_embed\.", "inputs.time."),
    (r"^lowres_time_embed\.", "inputs.low_res_time."),
    (r"(time)\.0\.weights$", r"\1.embedding.weight"),
    (r"(time)\.1\.", r"\1.hidden."),
    (r"(time)\.3\.", r"\1.out."),
    (r"^attention_pooling\.0\.W\.", "inputs.text.pool.score."),
    (r"^attention_pooling\.1\.", "inputs.text.pooled.0."),
    (r"^attention_pooling\.2\.", "inputs.text.pooled.1."),
    (r"^text_to_cond\.", "inputs.text.to_context."),
    (r"^to_text_non_attn_cond\.", "inputs.text.to_time."),
    (r"^(init_conv|input_blocks\.0)\.(0\.)?(weight|bias)$", r"conv_in.\3"),
    (r"^out\.0\.", "norm_out."),
    (r"^out\.(2\.)?", "conv_out."),
    (r"^middle_block\.0\.", "middle.0.layer."),
    (r"^middle_block\.1\.", "middle.0.attention."),
    (r"^middle_block\.2\.", "middle.1.layer."),
    (r"\.resample\.layer\.(op|conv)\.", ".resample.layer."),
    (r"\.h_upd\.conv\.", ".doubling.0."),
    (r"\.x_upd\.conv\.", ".doubling.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.[23]\.", ".conv2."),
    (r"\.(skip_connection|shortcut)\.", ".skip."),
    (r"\.(self|cross)_attention_block\.", r".\1_attention."),
    (r"(attention)\.norm_self\.", r"\1.norm_keys."),
    (r"(attention)\.q\.", r"\1.attention.to_q."),
    (r"(attention)\.kv_self\.", r"\1.attention.to_kv."),
    (r"(attention)\.(kv_context|kv)\.", r"\1.attention.context_to_kv."),
    (r"(attention)\.qkv\.", r"\1.attention.to_qkv."),
    (r"\.ff\.norm\.", ".feed_forward.norm."),
    (r"\.ff\.net\.0\.proj\.", ".feed_forward.expand."),
    (r"\.ff\.net\.2\.", ".feed_forward.contract."),
    (r"((self|cross)_attention)\.proj_out\.", r"\1.attention.to_out."),
)


def unet_config(
    settings: Mapping[str, Any], *, unet_type: str, text_dim: int, token_length: int, low_res_noise: bool
) -> RegularUNetConfig | EfficientUNetConfig:
    """The configuration of a UNet like the one NeMo builds.

    Args:
        settings: the `unet` section of a model's configuration.
        unet_type: base, sr-unet or sr.
        text_dim: width of the text embeddings.
        token_length: number of tokens that captions are padded to.
        low_res_noise: NeMo's `noise_cond_aug`.
    Raises:
        ValueError: a setting is unknown or has no counterpart here.
    """
    if unet_type not in ("base", "sr-unet", "sr"):
        raise ValueError(f"unet_type must be base, sr-unet or sr (got {unet_type!r})")
    efficient = unet_type == "sr"
    defaults = _EFFICIENT if efficient else _REGULAR
    unknown = sorted(settings.keys() - defaults.keys() - {"embed_dim", "image_size"})
    if unknown:
        raise ValueError(f"unet: {', '.join(unknown)}: not a setting of NeMo 1.23.0's {unet_type} UNet")
    unet = {**defaults, **settings}
    for name, (only, why) in (_ONLY_EFFICIENT if efficient else _ONLY).items():
        if unet[name] != only:
            raise ValueError(f"unet.{name} is {unet[name]}, but only {only} has a counterpart here: {why}")
    heads_by_width = unet["per_head_channels"] != -1
    frequencies = unet["learned_sinu_pos_emb_dim"] // 2
    low_res = efficient or bool(unet["low_res_cond"])
    if low_res != (unet_type != "base"):
        raise ValueError(f"unet.low_res_cond is {low_res}, which no {unet_type} UNet of NeMo runs with")
    common = {
        "image_size_px": unet["image_size"],
        "text_dim": text_dim,
        "in_channels": unet["channels"],
        "out_channels": unet["channels"],
        "low_res": low_res,
        "low_res_noise": low_res_noise,
        "activation_checkpointing": unet["gradient_checkpointing"],
        "embed_dim": unet["embed_dim"],
        "channel_mult": unet["channel_mult"],
        "attention_type": unet["attention_type"],
        "head_dim": unet["per_head_channels"] if heads_by_width else 64,
        "num_heads": None if heads_by_width else unet["num_attn_heads"],
        "pooling": unet["feature_pooling_type"],
        "null_token": unet["use_null_token"],
        "scale_shift": unet["scale_shift_norm"],
        "padded_tokens": token_length,
        "learned_fourier_frequencies": frequencies or None,
    }
    if efficient:
        return EfficientUNetConfig.model_validate(
            {
                **common,
                "num_res_blocks": unet["num_resblocks"],
                "attention_levels": [bool(flag) for flag in unet["atnn_enabled_at"]],
                "init_kernel_size": unet["init_conv_kernel_size"],
                "scale_skips": unet["skip_connection_scaling"],
            }
        )
    return RegularUNetConfig.model_validate(
        {
            **common,
            "num_res_blocks": unet["num_res_blocks"],
            "attention_resolutions": _attending(unet),
            "cond_dim": unet["cond_dim"],
            "dropout": float(unet["dropout"]),
            "resblock_updown": unet["resblock_updown"],
            "resblock_upsample": "conv_transpose",
            "resample_with_conv": unet["resample_with_conv"],
        }
    )


def _attending(unet: Mapping[str, Any]) -> list[int]:
    """Sides of the levels with attention: NeMo compares by how much the image's side is divided, rounded down."""
    size, levels = unet["image_size"], {2**level for level in range(len(unet["channel_mult"]))}
    divisors = [size // int(side) for side in unet["attention_resolutions"]]
    return [size // divisor for divisor in divisors if divisor in levels]


def unet_weights(state: Mapping[str, Tensor], config: RegularUNetConfig | EfficientUNetConfig) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, from a state dict of NeMo.

    Args:
        state: of the UNet, or of a model that contains it, also with the prefixes of torch.compile and Float16Module.
    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    return match_parameters(_named(state, config), config)


def _named(
    state: Mapping[str, Tensor], config: RegularUNetConfig | EfficientUNetConfig
) -> Iterator[tuple[str, str, Tensor]]:
    reads_tokens = isinstance(config, RegularUNetConfig) or any(config.attention_levels)
    reads_tokens = (reads_tokens and config.attention_type != "self") or config.pooling == "mean"
    for full, values in state.items():
        if full.startswith("text_encoder."):  # frozen, and part of another model
            continue
        name = full.replace("_orig_mod.", "").rpartition("unet.")[2]
        if name.startswith("text_to_cond.") and not reads_tokens:  # NeMo creates it, but never uses it
            continue
        converted = convert_name(name, config)
        if ".to_qkv." in converted:
            q, kv = values.tensor_split([len(values) // 3])
            yield full, converted.replace("to_qkv", "to_q"), q
            yield full, converted.replace("to_qkv", "to_kv"), kv
        else:
            yield full, converted, values


def convert_name(name: str, config: RegularUNetConfig | EfficientUNetConfig) -> str:
    """The name here of a tensor of NeMo's UNet; an unknown one keeps its name."""
    name = _efficient_place(name, config) if isinstance(config, EfficientUNetConfig) else regular_place(name, config)
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    if config.attention_type != "stacked":
        name = name.replace(".attention.proj_out.", ".attention.attention.to_out.")
    return name


def _efficient_place(name: str, config: EfficientUNetConfig) -> str:
    found = re.match(r"([DU])Blocks\.(\d+)\.(?:blocks\.(\d+)|(attention_layer|conv))\.", name)
    if not found or int(found[2]) >= len(config.num_res_blocks):
        return name
    level = int(found[2])
    place = f"down.{level}" if found[1] == "D" else f"up.{len(config.num_res_blocks) - 1 - level}"
    if found[4] == "conv":
        part = "resample.layer"
    elif found[4]:
        part = f"blocks.{config.num_res_blocks[level] - 1}.attention"
    else:
        part = f"blocks.{found[3]}.layer"
    return f"{place}.{part}.{name[found.end() :]}"


def regular_place(name: str, config: RegularUNetConfig) -> str:
    """NeMo numbers blocks through all levels; a layer that changes the resolution is a separate block on the way down,
    and the last layer of a block on the way up."""
    found = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.", name)
    if not found or (found[1], found[2]) == ("input", "0"):
        return name
    down, number, layer = found[1] == "input", int(found[2]), int(found[3])
    counts, sides = config.blocks_per_level, config.sides_px
    if down:
        number -= 1  # the first convolution
    else:
        counts, sides = [count + 1 for count in counts[::-1]], sides[::-1]
    level = 0
    while level < len(counts) - 1 and number >= counts[level] + down:
        number, level = number - counts[level] - down, level + 1
    part = f"blocks.{number}.layer"
    if layer == 1 and sides[level] in config.attention_resolutions:
        part = f"blocks.{number}.attention"
    elif layer or number == counts[level]:
        part = "resample.layer"
    return f"{'down' if down else 'up'}.{level}.{part}.{name[found.end() :]}"
