"""The UNets of DALLE2-pytorch's decoders as Hybrid UNets: settings and weights (DALLE2-pytorch 1.15.6, Unet)."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_core.conversion.weights import match_parameters
from imagen_core.models.hybrid.unet import HybridUNetConfig

_UNET: dict[str, Any] = {  # arguments of the class Unet
    "image_embed_dim": None,
    "text_embed_dim": None,
    "cond_dim": None,
    "num_image_tokens": 4,
    "num_time_tokens": 2,
    "dim_mults": (1, 2, 4, 8),
    "self_attn": False,
    "attn_dim_head": 32,
    "attn_heads": 16,
    "self_cond": False,
    "sparse_attn": False,
    "cosine_sim_cross_attn": False,
    "cosine_sim_self_attn": False,
    "cond_on_text_encodings": False,
    "max_text_len": 256,
    "add_image_embeds_to_time": True,
    "init_dim": None,
    "init_conv_kernel_size": 7,
    "resnet_groups": 8,
    "resnet_weight_standardization": False,
    "num_resnet_blocks": 2,
    "init_cross_embed": True,
    "init_cross_embed_kernel_sizes": (3, 7, 15),
    "cross_embed_downsample": False,
    "cross_embed_downsample_kernel_sizes": (2, 4),
    "memory_efficient": False,
    "scale_skip_connection": False,
    "pixel_shuffle_upsample": True,
    "final_conv_kernel_size": 1,
    "combine_upsample_fmaps": False,
    "checkpoint_during_training": False,
}
_DECIDED_BY_THE_DECODER = {"channels", "channels_out", "lowres_cond", "lowres_noise_cond", "cond_on_image_embeds"}
_WITHOUT_EFFECT = {"out_dim", "attend_at_middle"}
_CROSS_HEADS, _CROSS_HEAD_DIM = 8, 64  # whatever the settings say
_PLACES = {  # the modules of a level by index, on the way down and up
    "downs": {0: "before", 1: "first.layer", 2: "blocks", 3: "transformer", 4: "after"},
    "ups": {0: "first.layer", 1: "blocks", 2: "transformer", 3: "after"},
}
_RULES = (  # its names -> names here; each is applied once, in this order
    (r"^null_text_embed$", "inputs.text.null_tokens"),
    (r"^null_image_embed$", "inputs.image_embed.null_tokens"),
    (r"^null_image_hiddens$", "inputs.image_embed.null_vector"),
    (r"^image_to_tokens\.0\.", "inputs.image_embed.to_tokens."),
    (r"^to_image_hiddens\.0\.", "inputs.image_embed.to_vector."),
    (r"^to_time_hiddens\.1\.", "inputs.level.hidden.0."),
    (r"^to_time_cond\.0\.", "inputs.level.to_vector."),
    (r"^to_time_tokens\.0\.", "inputs.level.to_tokens."),
    (r"^norm_cond\.", "inputs.norm."),
    (r"^norm_mid_cond\.", "inputs.norm_middle."),
    (r"^text_to_cond\.", "inputs.text.to_context."),
    (r"^init_conv\.(weight|bias)$", r"conv_in.convs.0.\1"),
    (r"^init_conv\.", "conv_in."),
    (r"^init_resnet_block\.", "first.layer."),
    (r"^mid_block1\.", "middle.0.layer."),
    (r"^mid_attn\.", "middle.1."),
    (r"^mid_block2\.", "middle.2.layer."),
    (r"^final_resnet_block\.", "final.layer."),
    (r"^to_out\.", "conv_out."),
    (r"(blocks\.\d+)\.", r"\1.layer."),
    (r"^(up\.\d+\.after)\.1\.", r"\1.conv."),
    (r"^(up\.\d+\.after)\.net\.", r"\1."),
    (r"\.time_mlp\.1\.", ".time."),
    (r"\.block([12])\.norm\.", r".norm\1."),
    (r"\.block([12])\.project\.", r".conv\1."),
    (r"\.res_conv\.", ".skip."),
    (r"\.cross_attn\.to_kv\.", ".cross_attn.context_to_kv."),
    (r"\.cross_attn\.", ".text_attention."),
    (r"(transformer|^middle\.1)\.fn\.fn\.", r"\1.layers.0."),
    (r"(text_attention|layers\.0)\.(null_kv|to_q|to_kv|context_to_kv|to_out\.0)", r"\1.attention.\2"),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.to_out\.1\.g$", ".norm_out.weight"),
    (r"\.g$", ".weight"),
)
_FIXED: dict[str, object] = {
    "conditions_in": "other_blocks",
    "text_in_middle_only": True,
    "caption_vector": False,
    "perceiver": False,
    "cross_num_heads": _CROSS_HEADS,
    "cross_head_dim": _CROSS_HEAD_DIM,
    "ff_mult": 0,
    "attend_to_conditions": False,
    "deepest_widen": "conv",
    "res_block": "conv_first",
    "global_context": False,
    "final_global_context": False,
    "num_fourier_frequencies": None,
    "sinusoids": "closed",
    "level_activation": "gelu",
    "init_residual": True,
}
"""What is the same in every UNet of DALLE2-pytorch."""


def unet_config(
    settings: Mapping[str, Any],
    *,
    channels: int,
    learned_variance: bool,
    low_res: bool,
    reads_image_embed: bool,
    reads_text: bool,
    size_px: int,
) -> HybridUNetConfig:
    """A Hybrid UNet like the one DALLE2-pytorch builds in a decoder.

    Args:
        settings: arguments of its class Unet.
        channels, learned_variance, low_res, reads_image_embed, reads_text, size_px: decided by the decoder; size_px is
            the side of the images in pixels.
    Raises:
        ValueError: a setting is unknown, missing, or has no counterpart here.
    """
    unet = _checked(settings, reads_image_embed=reads_image_embed, reads_text=reads_text)
    levels = len(unet["dim_mults"])
    kernels = unet["init_cross_embed_kernel_sizes"] if unet["init_cross_embed"] else (unet["init_conv_kernel_size"],)
    return HybridUNetConfig.model_validate(
        {
            **_FIXED,
            "image_size_px": size_px,
            "dim": unet["dim"],
            "dim_mults": unet["dim_mults"],
            "in_channels": channels,
            "out_channels": channels * (2 if learned_variance else 1),
            "text_dim": unet["text_embed_dim"] if reads_text else None,
            "unread_caption_parameters": not reads_text,
            "image_embed_dim": unet["image_embed_dim"] if reads_image_embed else None,
            "num_image_tokens": unet["num_image_tokens"],
            "low_res": low_res,
            "self_conditioning": unet["self_cond"],
            "activation_checkpointing": unet["checkpoint_during_training"],
            "num_res_blocks": _levels(unet, "num_resnet_blocks", levels),
            "attention_levels": _levels(unet, "self_attn", levels),
            "cross_attention_levels": (False, *(True,) * (levels - 1)),
            "cond_dim": unet["cond_dim"] or unet["dim"],
            "max_text_tokens": unet["max_text_len"],
            "num_heads": unet["attn_heads"],
            "head_dim": unet["attn_dim_head"],
            "init_kernels": sorted(kernels),
            "memory_efficient": unet["memory_efficient"],
            "initial_res_block": unet["memory_efficient"],
            "convs_after": unet["memory_efficient"],
            "downsample": "cross_embed" if unet["cross_embed_downsample"] else "pixel_unshuffle",
            "upsample": "pixel_shuffle" if unet["pixel_shuffle_upsample"] else "repeat_conv",
            "weight_standardization": unet["resnet_weight_standardization"],
            "scale_skips": unet["scale_skip_connection"],
            "out_kernel_size": unet["final_conv_kernel_size"],
        }
    )


def _checked(settings: Mapping[str, Any], *, reads_image_embed: bool, reads_text: bool) -> dict[str, Any]:
    """The settings with defaults; ValueError for those that `unet_config` refuses."""
    unknown = sorted(settings.keys() - _UNET.keys() - _DECIDED_BY_THE_DECODER - _WITHOUT_EFFECT - {"dim"})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a setting of DALLE2-pytorch 1.15.6's Unet")
    if "dim" not in settings:
        raise ValueError("dim is missing; give the arguments of DALLE2-pytorch's Unet")
    unet = {**_UNET, **settings}
    levels = len(unet["dim_mults"])
    attends, groups = _levels(unet, "self_attn", levels), _levels(unet, "resnet_groups", levels)
    cond_dim = unet["cond_dim"] or unet["dim"]
    only = {  # settings with one supported value, and whether that matters in this network
        "num_time_tokens": (2, True),
        "sparse_attn": (False, not all(attends)),
        "cosine_sim_cross_attn": (False, True),
        "cosine_sim_self_attn": (False, True),
        "combine_upsample_fmaps": (False, True),  # it upsamples them by another kernel
        "add_image_embeds_to_time": (True, reads_image_embed),
        "init_dim": (unet["dim"], unet["init_dim"] is not None),
        "resnet_groups": (8, set(groups) != {8}),
        "cross_embed_downsample_kernel_sizes": ([2, 4], unet["cross_embed_downsample"]),
    }
    for name, (value, matters) in only.items():
        given = sorted(unet[name]) if isinstance(unet[name], list | tuple) else unet[name]
        if matters and given != value:
            raise ValueError(f"{name} is {unet[name]}, but only {value} has a counterpart here")
    for name, reads in (("image_embed_dim", reads_image_embed), ("text_embed_dim", reads_text)):
        if reads and unet[name] is None:
            raise ValueError(f"{name} is missing; give the width of the embeddings that it reads")
    if reads_image_embed and unet["image_embed_dim"] == cond_dim:
        raise ValueError(f"image_embed_dim is {cond_dim}, as cond_dim is; it takes no batch of such embeddings")
    return unet


def _levels(unet: Mapping[str, Any], name: str, levels: int) -> tuple[Any, ...]:
    value = unet[name]
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def unet_weights(
    state: Mapping[str, Tensor], config: HybridUNetConfig, *, constrained: bool = False
) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, from a state dict of DALLE2-pytorch's Unet.

    Three numbers of it are in the weights here: its attention divides by a head's width, not by the root of that; it
    reads image embeddings as unit vectors; and it halves the channels of a learned variance, plus 1/2, before their
    sigmoid.

    Args:
        constrained: the decoder's learned_variance_constrain_frac.
    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    return match_parameters(_named(state, config, constrained=constrained), config)


def _named(
    state: Mapping[str, Tensor], config: HybridUNetConfig, *, constrained: bool
) -> Iterator[tuple[str, str, Tensor]]:
    captions = "inputs.unread." if config.unread_caption_parameters else "inputs.text."
    for name, values in state.items():
        converted = convert_name(name).replace("inputs.text.", captions)
        if converted.startswith("inputs.image_embed.null_") and config.image_embed_dim is None:
            continue  # DALLE2-pytorch creates them, but never uses them
        if converted == "inputs.level.hidden.0.weight":  # it has sines first, this library cosines
            values = values.roll(values.shape[1] // 2, dims=1)
        elif re.search(r"layers\.0\.attention\.to_q\.weight$", converted):
            values = values * config.heads(-1)[1] ** -0.5
        elif re.search(r"image_embed\.to_(tokens|vector)\.weight$", converted) and config.image_embed_dim:
            values = values * config.image_embed_dim**-0.5
        elif name.startswith("init_conv.") and values.ndim == 4 and config.low_res and config.self_conditioning:
            image, estimate, low_res = values.split(config.in_channels, dim=1)
            values = torch.cat([image, low_res, estimate], dim=1)
        elif name.startswith("to_out.") and constrained:
            image, share = values.split(config.in_channels)
            values = torch.cat([image, share / 2 + (0.5 if values.ndim == 1 else 0)])
        yield name, converted, values


def convert_name(name: str) -> str:
    """The name here of a tensor of DALLE2-pytorch's Unet."""
    place = re.match(r"(downs|ups)\.(\d+)\.(\d+)\.", name)
    if place and int(place[3]) in _PLACES[place[1]]:
        way, level, number = place.groups()
        name = f"{way[:-1]}.{level}.{_PLACES[way][int(number)]}.{name[place.end() :]}"
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
