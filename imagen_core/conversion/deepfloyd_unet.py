"""DeepFloyd IF's UNets as Regular UNets, and back: settings and weights as in diffusers' UNet2DConditionModel.

IF is ADM's UNet with T5's tokens in its attention and, pooled, in the time vector (github.com/deep-floyd/IF,
deepfloyd_if/model/unet.py); diffusers 0.42 has it as options of `UNet2DConditionModel`. Both directions are exact:
what has no counterpart is refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagen_core.conversion.weights import match_parameters
from imagen_core.models.layers.activation import Activation
from imagen_core.models.unet.regular import RegularUNetConfig

CLASS = "UNet2DConditionModel"
MAX_TOKENS = 77
"""Tokens of a caption, padding included; IF reads them all."""
_PLAIN = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
_ATTENDING = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu"}
_DEFAULTS: dict[str, Any] = {  # of UNet2DConditionModel; those without one are named by _NEEDED
    "only_cross_attention": False,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "class_embed_type": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "conv_in_kernel": 3,
    "mid_block_only_cross_attention": None,
    "addition_embed_type_num_heads": 64,
}
_NEEDED = {
    *("sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"),
    *("cross_attention_dim", "encoder_hid_dim"),
}
_ONLY: dict[str, tuple[Any, tuple[Any, ...]]] = {  # the default, and the values that have a counterpart here
    "mid_block_type": ("UNetMidBlock2DCrossAttn", ("UNetMidBlock2DSimpleCrossAttn",)),
    "addition_embed_type": (None, ("text",)),
    "cross_attention_norm": (None, ("group_norm",)),
    "encoder_hid_dim_type": (None, (None, "text_proj")),
    "center_input_sample": (False, (False,)),
    "flip_sin_to_cos": (True, (True,)),
    "freq_shift": (0, (0,)),
    "norm_num_groups": (32, (32,)),
    "norm_eps": (1e-5, (1e-5,)),
    "num_attention_heads": (None, (None,)),
    "addition_time_embed_dim": (None, (None,)),
    "num_class_embeds": (None, (None,)),
    "time_embedding_type": ("positional", ("positional",)),
    "timestep_post_act": (None, (None,)),
    "time_cond_proj_dim": (None, (None,)),
    "conv_out_kernel": (3, (3,)),
    "projection_class_embeddings_input_dim": (None, (None,)),
    "class_embeddings_concat": (False, (False,)),
    "attention_type": ("default", ("default",)),
}
_WITHOUT_EFFECT = {  # read by blocks that IF has none of
    *("downsample_padding", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    *("dual_cross_attention", "use_linear_projection", "upcast_attention"),
}
_COUNTERPART = {  # settings of a Regular UNet without which diffusers has no such network
    "pooling": ("multihead",),
    "attention_type": ("fused", "cross"),
    "shared_norm": (True,),
    "resblock_updown": (True,),
    "resblock_upsample": ("repeat",),
    "num_heads": (None,),
    "null_token": (False,),
    "learned_fourier_frequencies": (None,),
    "num_text_layers": (None,),
    "text_embed_dim": (None,),
    "image_embed_dim": (None,),
    "num_classes": (None,),
    "transcription": (None,),
    "up_num_heads": (None,),
    "middle_num_heads": (None,),
    "self_conditioning": (False,),
    "condition_channels": (0,),
}
_RULES = (  # names here -> diffusers'; each is applied once, in this order
    (r"^inputs\.time\.", "time_embedding."),
    (r"^inputs\.low_res_time\.", "class_embedding."),
    (r"(embedding)\.hidden\.", r"\1.linear_1."),
    (r"(embedding)\.out\.", r"\1.linear_2."),
    (r"^inputs\.text\.to_context\.", "encoder_hid_proj."),
    (r"^inputs\.text\.pool\.norm\.", "add_embedding.norm1."),
    (r"^inputs\.text\.pool\.norm_out\.", "add_embedding.norm2."),
    (r"^inputs\.text\.pool\.proj\.", "add_embedding.proj."),
    (r"^inputs\.text\.pool\.query$", "add_embedding.pool.positional_embedding"),
    (r"^inputs\.text\.pool\.to_([qkv]+)\.", r"add_embedding.pool.\1_proj."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^middle\.(\d)\.layer\.", r"mid_block.resnets.\1."),
    (r"^middle\.0\.attention\.", "mid_block.attentions.0."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.layer\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.resample\.layer\.", r"\1_blocks.\2.\1samplers.0."),
    (r"\.time\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.norm\.", ".group_norm."),
    (r"\.norm_context\.", ".norm_cross."),
    (r"\.attention\.context_to_kv\.", ".add_kv_proj."),
    (r"\.attention\.to_out\.", ".to_out.0."),
    (r"\.attention\.to_", ".to_"),
)
_SPLIT = {"to_kv": ("to_k", "to_v"), "add_kv_proj": ("add_k_proj", "add_v_proj"), "kv_proj": ("k_proj", "v_proj")}
"""Layers that are one here and two in diffusers, keys first."""


def unet_config(settings: Mapping[str, Any]) -> RegularUNetConfig:
    """The configuration of a UNet like the one diffusers builds.

    Args:
        settings: config.json of a UNet2DConditionModel; keys that begin with an underscore are not read.
    Raises:
        ValueError: a setting is missing, unknown, or has no counterpart here.
    """
    unet = _checked(settings)
    widths, size = _whole_numbers("block_out_channels", unet), unet["sample_size"]
    if not isinstance(size, int):
        raise ValueError(f"sample_size must be one number of pixels (got {size!r})")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels: the first must divide the others (got {list(widths)})")
    if _one_number("cross_attention_dim", unet) % 32:
        raise ValueError(f"cross_attention_dim must be a multiple of 32 (got {unet['cross_attention_dim']})")
    low_res = _known("class_embed_type", unet, {None: False, "timestep": True})
    return RegularUNetConfig.model_validate(
        {
            "image_size_px": size,
            "text_dim": unet["encoder_hid_dim"],
            "cond_dim": _one_number("cross_attention_dim", unet),
            "padded_tokens": MAX_TOKENS,
            "dropped_caption": "empty_caption",
            "pooling": "multihead",
            "pooling_heads": unet["addition_embed_type_num_heads"],
            "in_channels": _image_channels(unet, low_res),
            "out_channels": unet["out_channels"],
            "low_res": low_res,
            "low_res_noise": low_res,
            "dropout": unet["dropout"],
            "embed_dim": widths[0],
            "channel_mult": tuple(width // widths[0] for width in widths),
            "num_res_blocks": _whole_numbers("layers_per_block", unet, count=len(widths)),
            "attention_type": "cross" if _reads_text_only(unet) else "fused",
            "attention_resolutions": _attending_sides(unet, size),
            "shared_norm": True,
            "head_dim": _one_number("attention_head_dim", unet),
            "init_kernel_size": unet["conv_in_kernel"],
            "scale_shift": _known("resnet_time_scale_shift", unet, {"scale_shift": True, "default": False}),
            "resblock_updown": True,
            "activation": _known("act_fn", unet, _ACTIVATIONS),
            "time_embed_dim": unet["time_embedding_dim"],
            "time_activations": _time_activations(unet),
            "block_divisor": unet["resnet_out_scale_factor"],
            "middle_divisor": unet["mid_block_scale_factor"],
        }
    )


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with their defaults; ValueError for one that is missing, unknown, or has another value than IF's."""
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    if missing := sorted(name for name in _NEEDED if settings.get(name) is None):
        raise ValueError(f"{missing[0]} is missing; give the UNet of a DeepFloyd IF")
    known = _NEEDED | _DEFAULTS.keys() | _ONLY.keys() | _WITHOUT_EFFECT
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"{', '.join(unknown)}: not a setting of the {CLASS} known here")
    for name, (default, possible) in _ONLY.items():
        if (value := settings.get(name, default)) not in possible:
            raise ValueError(f"{name} is {value!r}, but a DeepFloyd IF has {' or '.join(map(repr, possible))}")
    return {**_DEFAULTS, **settings}


def why_not(config: object) -> str | None:
    """Why diffusers has no network like that of this configuration, in words; None if it has one."""
    if not isinstance(config, RegularUNetConfig):
        return f"family is {getattr(config, 'family', type(config).__name__)!r}, not regular"
    for name, possible in _COUNTERPART.items():
        value = getattr(config, name)
        if value not in possible:
            return f"{name} is {value!r}, not {' or '.join(map(repr, possible))}"
    if config.text_dim is None or config.padded_tokens is None:
        return f"{'text_dim' if config.text_dim is None else 'padded_tokens'} is null"
    if config.low_res != config.low_res_noise:
        return "low_res_noise is false, though it upsamples"
    return None


def unet_settings(config: RegularUNetConfig) -> dict[str, Any]:
    """config.json of the UNet2DConditionModel like the one of this configuration.

    Raises:
        ValueError: diffusers has none; see `why_not`.
    """
    if reason := why_not(config):
        raise ValueError(f"diffusers has no such network: {reason}")
    attends = [side in config.attention_resolutions for side in config.sides_px]
    activates_twice = config.time_activations == 2
    alone = config.low_res or activates_twice  # an activation before the ResBlocks, as published for each stage
    return {
        "_class_name": CLASS,
        "sample_size": config.image_size_px,
        "in_channels": config.input_channels,
        "out_channels": config.out_channels,
        "down_block_types": [_ATTENDING[0] if level else _PLAIN[0] for level in attends],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [_ATTENDING[1] if level else _PLAIN[1] for level in reversed(attends)],
        "block_out_channels": config.widths,
        "layers_per_block": list(config.blocks_per_level),
        "only_cross_attention": config.attention_type == "cross",
        "cross_attention_dim": config.cond_dim,
        "cross_attention_norm": "group_norm",
        "attention_head_dim": config.head_dim,
        "encoder_hid_dim": config.text_dim,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": config.pooling_heads,
        "class_embed_type": "timestep" if config.low_res else None,
        "act_fn": config.activation,
        "dropout": config.dropout,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "conv_in_kernel": config.init_kernel_size,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "resnet_skip_time_act": alone and not activates_twice,
        "time_embedding_act_fn": config.activation if alone else None,
        "time_embedding_dim": config.time_embed_dim,
        "resnet_out_scale_factor": config.block_divisor,
        "mid_block_scale_factor": config.middle_divisor,
    }


def unet_weights(state: Mapping[str, Tensor], config: RegularUNetConfig) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, in float32, from a state dict of diffusers' UNet.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    named = [(name, diffusers_names(name)) for name in _parameters(config)]
    wanted = {theirs for _, names in named for theirs in names}
    if missing := sorted(wanted - state.keys()):
        raise ValueError(f"{missing[0]} is missing ({len(missing)} of {len(wanted)} tensors are)")
    if unknown := sorted(state.keys() - wanted):
        raise ValueError(f"{unknown[0]} has no place in a network of these settings (as {len(unknown)} tensors)")
    return match_parameters(_joined(state, named), config)


def diffusers_weights(tensors: Mapping[str, Tensor], config: RegularUNetConfig) -> dict[str, Tensor]:
    """The state dict of diffusers' UNet from the parameters of `config.build()`, by name; undoes `unet_weights`.

    Raises:
        ValueError: diffusers has no such network; see `why_not`.
    """
    if reason := why_not(config):
        raise ValueError(f"diffusers has no such network: {reason}")
    found: dict[str, Tensor] = {}
    for name in _parameters(config):
        theirs, values = diffusers_names(name), tensors[name]
        found |= dict(zip(theirs, values.chunk(len(theirs)), strict=True))
    found["add_embedding.pool.positional_embedding"] = found["add_embedding.pool.positional_embedding"][None]
    return {name: values.contiguous() for name, values in found.items()}


def diffusers_names(name: str) -> tuple[str, ...]:
    """diffusers' names of a parameter here: one, or those of its keys and its values."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    layer, _, last = name.rpartition(".")
    above, dot, layer = layer.rpartition(".")
    if layer not in _SPLIT:
        return (name,)
    return tuple(f"{above}{dot}{part}.{last}" for part in _SPLIT[layer])


def _parameters(config: RegularUNetConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in config.build().named_parameters()]


def _joined(
    state: Mapping[str, Tensor], named: Sequence[tuple[str, tuple[str, ...]]]
) -> Iterator[tuple[str, str, Tensor]]:
    for name, theirs in named:
        parts = [state[one] for one in theirs]
        if any(part.shape != parts[0].shape for part in parts):
            shapes = " and ".join(f"{one} {tuple(part.shape)}" for one, part in zip(theirs, parts, strict=True))
            raise ValueError(f"{shapes}: keys and values must have one shape")
        yield " and ".join(theirs), name, torch.cat(parts) if len(parts) > 1 else parts[0]


def _known(name: str, unet: Mapping[str, Any], names: Mapping[Any, Any]) -> Any:
    if unet[name] not in names:
        raise ValueError(f"{name} must be {' or '.join(map(repr, names))} (got {unet[name]!r})")
    return names[unet[name]]


def _whole_numbers(name: str, unet: Mapping[str, Any], count: int | None = None) -> tuple[int, ...]:
    """A list of positive whole numbers, or with `count` also one number for all of them."""
    value = unet[name]
    values = (value,) * count if count is not None and isinstance(value, int) else value
    if not isinstance(values, list | tuple) or not values or not all(isinstance(v, int) and v > 0 for v in values):
        raise ValueError(f"{name} must be positive whole numbers (got {value!r})")
    return tuple(values)


def _one_number(name: str, unet: Mapping[str, Any]) -> int:
    value = unet[name]
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1 or not isinstance(number := values.pop(), int):
        raise ValueError(f"{name} must be one whole number for all levels (got {value!r})")
    return number


def _image_channels(unet: Mapping[str, Any], low_res: bool) -> int:
    inputs, outputs = unet["in_channels"], unet["out_channels"]
    channels = inputs // (1 + low_res)
    if channels * (1 + low_res) != inputs or outputs != 2 * channels:
        raise ValueError(
            f"in_channels is {inputs} and out_channels {outputs}; a DeepFloyd IF reads an image"
            f"{', and the upsampled one,' if low_res else ''} and predicts noise and variance: "
            f"{'6 and 6' if low_res else '3 and 6'}"
        )
    return channels


def _reads_text_only(unet: Mapping[str, Any]) -> bool:
    """Whether pixels attend to text alone, at every level and in the middle."""
    value, middle = unet["only_cross_attention"], unet["mid_block_only_cross_attention"]
    levels = {bool(level) for level in value} if isinstance(value, list | tuple) else {bool(value)}
    if middle is None:
        middle = False if isinstance(value, list | tuple) else value
    if len(levels | {bool(middle)}) != 1:
        raise ValueError(
            f"only_cross_attention is {value!r} and mid_block_only_cross_attention "
            f"{unet['mid_block_only_cross_attention']!r}; only one kind of attention for all levels has a counterpart"
        )
    return levels.pop()


def _attending_sides(unet: Mapping[str, Any], size: int) -> tuple[int, ...]:
    down, up = list(unet["down_block_types"]), list(unet["up_block_types"])
    for types, possible in ((down, (_PLAIN[0], _ATTENDING[0])), (up, (_PLAIN[1], _ATTENDING[1]))):
        if other := [kind for kind in types if kind not in possible]:
            raise ValueError(f"{other[0]} is no block of a DeepFloyd IF, which has {' and '.join(possible)}")
    attends = [kind == _ATTENDING[0] for kind in down]
    if len(down) != len(unet["block_out_channels"]) or attends != [kind == _ATTENDING[1] for kind in reversed(up)]:
        raise ValueError(
            f"up_block_types {up} must mirror down_block_types {down}, with one for each of block_out_channels "
            f"{list(unet['block_out_channels'])}"
        )
    return tuple(size // 2**level for level, attending in enumerate(attends) if attending)


def _time_activations(unet: Mapping[str, Any]) -> int:
    """How often the time vector is activated before a ResBlock projects it."""
    own = unet["time_embedding_act_fn"]
    if own is not None and _ACTIVATIONS.get(own) != _ACTIVATIONS.get(unet["act_fn"]):
        raise ValueError(f"time_embedding_act_fn is {own!r}, but act_fn {unet['act_fn']!r}; they must be the same")
    count = (own is not None) + (not unet["resnet_skip_time_act"])
    if not count:
        raise ValueError("resnet_skip_time_act is true without time_embedding_act_fn: nothing activates the time")
    return count
