"""imagen-pytorch's UNets as Hybrid UNets: settings and weights (imagen-pytorch 1.24.2 to 2.1.0,
imagen_pytorch.py)."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_core.conversion.weights import match_parameters
from imagen_core.models.hybrid.unet import HybridUNetConfig

_UNET: dict[str, Any] = {  # arguments of the class Unet, and their defaults in an ImagenConfig
    "dim_mults": (1, 2, 4, 8),
    "num_resnet_blocks": 1,
    "cond_dim": None,
    "num_time_tokens": 2,
    "learned_sinu_pos_emb_dim": 16,
    "cond_images_channels": 0,
    "attn_dim_head": 32,
    "attn_heads": 16,
    "ff_mult": 2.0,
    "layer_attns": True,
    "layer_attns_depth": 1,
    "layer_mid_attns_depth": 1,
    "attend_at_middle": True,
    "layer_cross_attns": True,
    "use_linear_attn": False,
    "use_linear_cross_attn": False,
    "max_text_len": 256,
    "init_dim": None,
    "init_conv_kernel_size": 7,
    "init_cross_embed": True,
    "init_cross_embed_kernel_sizes": (3, 7, 15),
    "cross_embed_downsample": False,
    "resnet_groups": 8,
    "attn_pool_text": True,
    "attn_pool_num_latents": 32,
    "memory_efficient": False,
    "init_conv_to_final_conv_residual": False,
    "use_global_context_attn": True,
    "scale_skip_connection": True,
    "final_resnet_block": True,
    "final_conv_kernel_size": 3,
    "self_cond": False,
    "combine_upsample_fmaps": False,
    "pixel_shuffle_upsample": True,
}
_DECIDED_BY_THE_CASCADE = {"text_embed_dim", "channels", "channels_out", "lowres_cond", "cond_on_text"}
_WITHOUT_EFFECT = {"num_image_tokens", "out_dim", "layer_attns_add_text_cond", "dropout", "resize_mode"}
_WITHOUT_EFFECT |= {"cross_embed_downsample_kernel_sizes"}
_MIDDLE_HEADS, _MIDDLE_HEAD_DIM, _MIDDLE_FF_MULT = 8, 64, 2  # of the layers in the middle, whatever the settings say
_LAST_IN_MIDDLE = "middle.last"  # its index depends on whether attention comes before it
_PLACES = {  # the modules of a level by index, on the way down and up
    "downs": {0: "before", 1: "first.layer", 2: "blocks", 3: "transformer", 4: "after"},
    "ups": {0: "first.layer", 1: "blocks", 2: "transformer", 3: "after"},
}
_RULES = (  # imagen-pytorch's names -> names here; each is applied once, in this order
    (r"^null_text_embed$", "inputs.text.null_tokens"),
    (r"^null_text_hidden$", "inputs.text.null_vector"),
    (r"^to_lowres_time_", "inputs.low_res_level.to_time_"),
    (r"^to_time_", "inputs.level.to_time_"),
    (r"to_time_hiddens\.0\.weights", "embedding.weight"),
    (r"to_time_hiddens\.1\.", "hidden.0."),
    (r"to_time_cond\.0\.", "to_vector."),
    (r"to_time_tokens\.0\.", "to_tokens."),
    (r"^norm_cond\.", "inputs.norm."),
    (r"^text_to_cond\.", "inputs.text.to_context."),
    (r"^to_text_non_attn_cond\.", "inputs.text.to_vector."),
    (r"^attn_pool\.pos_emb\.weight$", "inputs.text.resampler.positions"),
    (r"^attn_pool\.to_latents_from_mean_pooled_seq\.0\.g$", "inputs.text.resampler.mean_norm.weight"),
    (r"^attn_pool\.to_latents_from_mean_pooled_seq\.1\.", "inputs.text.resampler.to_mean_latents."),
    (r"^attn_pool\.layers\.(\d+)\.0\.norm\.", r"inputs.text.resampler.layers.\1.norm_tokens."),
    (r"^attn_pool\.layers\.(\d+)\.0\.to_kv\.", r"inputs.text.resampler.layers.\1.attention.context_to_kv."),
    (r"^attn_pool\.layers\.(\d+)\.0\.to_out\.1\.", r"inputs.text.resampler.layers.\1.norm_out."),
    (r"^attn_pool\.layers\.(\d+)\.0\.(to_|qk_)", r"inputs.text.resampler.layers.\1.attention.\2"),
    (r"^attn_pool\.layers\.(\d+)\.0\.", r"inputs.text.resampler.layers.\1."),
    (r"^attn_pool\.layers\.(\d+)\.1\.", r"inputs.text.resampler.layers.\1.feed_forward."),
    (r"^attn_pool\.", "inputs.text.resampler."),
    (r"^init_conv\.(weight|bias)$", r"conv_in.convs.0.\1"),
    (r"^init_conv\.", "conv_in."),
    (r"^init_resnet_block\.", "first.layer."),
    (r"^mid_block1\.", "middle.0.layer."),
    (r"^mid_attn\.", "middle.1."),
    (r"^mid_block2\.", f"{_LAST_IN_MIDDLE}.layer."),
    (r"^upsample_combiner\.fmap_convs\.(\d+)\.norm\.gamma$", r"combiner.narrow.\1.0.gain"),
    (r"^upsample_combiner\.fmap_convs\.(\d+)\.groupnorm\.", r"combiner.narrow.\1.0."),
    (r"^upsample_combiner\.fmap_convs\.(\d+)\.project\.", r"combiner.narrow.\1.2."),
    (r"^final_res_block\.", "final.layer."),
    (r"^final_conv\.", "conv_out."),
    (r"(blocks\.\d+)\.", r"\1.layer."),
    (r"^(up\.\d+\.after)\.1\.", r"\1.conv."),
    (r"^(up\.\d+\.after)\.net\.", r"\1."),
    (r"\.after\.fns\.0\.", ".after.wide."),
    (r"\.after\.fns\.1\.", ".after.narrow."),
    (r"\.time_mlp\.1\.", ".time."),
    (r"\.block([12])\.norm\.gamma$", r".norm\1.gain"),
    (r"\.block([12])\.groupnorm\.", r".norm\1."),
    (r"\.block([12])\.project\.", r".conv\1."),
    (r"\.gca\.to_k\.", ".gate.score."),
    (r"\.gca\.net\.", ".gate.gate."),
    (r"\.res_conv\.", ".skip."),
    (r"\.cross_attn\.to_kv\.", ".cross_attn.context_to_kv."),
    (r"\.cross_attn\.", ".text_attention."),
    (r"(transformer|^middle\.1)\.layers\.(\d+)\.0\.", r"\1.layers.\2.own."),
    (r"(transformer|^middle\.1)\.layers\.(\d+)\.1\.", r"\1.layers.\2.feed_forward."),
    (r"\.own\.to_context\.0\.", ".own.norm_context."),
    (r"\.own\.to_context\.1\.", ".own.context_to_kv."),
    (r"\.(text_attention|own)\.(null_kv|qk_gains|to_q|to_kv|context_to_kv|to_out\.0)", r".\1.attention.\2"),
    (r"\.own\.", "."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.to_out\.1\.g$", ".norm_out.weight"),
    (r"\.g$", ".weight"),
)
_FIXED: dict[str, object] = {
    "middle_cross_num_heads": _MIDDLE_HEADS,
    "middle_cross_head_dim": _MIDDLE_HEAD_DIM,
    "qk_norm": True,
    "combine_at": "full",
}
"""What is the same in every UNet of imagen-pytorch."""


def unet_config(
    settings: Mapping[str, Any],
    *,
    text_dim: int | None,
    channels: int,
    low_res: bool,
    size_px: int,
    group_norm: bool = False,
) -> HybridUNetConfig:
    """A Hybrid UNet like the one imagen-pytorch builds in a cascade.

    Args:
        settings: arguments of its class Unet; of those left out, the defaults of its UnetConfig.
        text_dim, channels, low_res, size_px: decided by the cascade; text_dim is None without captions, and size_px
            the side of the images in pixels.
        group_norm: its ResBlocks have group norms, as before version 2, not root-mean-square norms.
    Raises:
        ValueError: a setting is unknown or has no counterpart here.
    """
    unet = _checked(settings)
    levels = len(unet["dim_mults"])
    kernels = unet["init_cross_embed_kernel_sizes"] if unet["init_cross_embed"] else (unet["init_conv_kernel_size"],)
    return HybridUNetConfig.model_validate(
        {
            **_FIXED,
            "image_size_px": size_px,
            "dim": unet["dim"],
            "dim_mults": unet["dim_mults"],
            **dict.fromkeys(("in_channels", "out_channels"), channels),
            "text_dim": text_dim,
            "unread_caption_parameters": text_dim is None,
            **dict.fromkeys(("low_res", "low_res_noise"), low_res),
            "self_conditioning": unet["self_cond"],
            "num_res_blocks": _levels(unet, "num_resnet_blocks", levels),
            "attention_levels": _levels(unet, "layer_attns", levels),
            "cross_attention_levels": _levels(unet, "layer_cross_attns", levels),
            "transformer_depth": _levels(unet, "layer_attns_depth", levels),
            "cond_dim": unet["cond_dim"],
            "max_text_tokens": unet["max_text_len"],
            "perceiver": unet["attn_pool_text"],
            "perceiver_num_latents": unet["attn_pool_num_latents"],
            "perceiver_num_heads": unet["attn_heads"],
            "perceiver_head_dim": unet["attn_dim_head"],
            "num_heads": unet["attn_heads"],
            "head_dim": unet["attn_dim_head"],
            "ff_mult": unet["ff_mult"],
            "middle_attention": unet["attend_at_middle"],
            "middle_transformer_depth": unet["layer_mid_attns_depth"],
            "init_kernels": sorted(kernels),
            **dict.fromkeys(("memory_efficient", "initial_res_block"), unet["memory_efficient"]),
            "upsample": "pixel_shuffle" if unet["pixel_shuffle_upsample"] else "repeat_conv",
            "global_context": unet["use_global_context_attn"],
            "norm": "group" if group_norm else "rms",
            "num_fourier_frequencies": unet["learned_sinu_pos_emb_dim"] // 2,
            "scale_skips": unet["scale_skip_connection"],
            "init_residual": unet["init_conv_to_final_conv_residual"],
            "combine_up_features": unet["combine_upsample_fmaps"],
            "out_kernel_size": unet["final_conv_kernel_size"],
        }
    )


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with defaults; ValueError for those that `unet_config` refuses."""
    unknown = sorted(settings.keys() - _UNET.keys() - _DECIDED_BY_THE_CASCADE - _WITHOUT_EFFECT - {"dim"})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a setting of imagen-pytorch 2.1.0's Unet")
    if "dim" not in settings:
        raise ValueError("dim is missing; give the arguments of imagen-pytorch's Unet")
    unet = {**_UNET, **settings}
    levels = len(unet["dim_mults"])
    attends, linear = _levels(unet, "layer_attns", levels), _levels(unet, "use_linear_attn", levels)
    _check(unet, linear_attention=any(use and not layer for use, layer in zip(linear, attends, strict=True)))
    return unet


def _levels(unet: Mapping[str, Any], name: str, levels: int) -> tuple[Any, ...]:
    value = unet[name]
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def _check(unet: Mapping[str, Any], *, linear_attention: bool) -> None:
    """Raises ValueError for settings without a counterpart."""
    only = {  # settings with one supported value, and whether that matters in this network
        "num_time_tokens": (2, True),
        "cond_images_channels": (0, True),
        "use_linear_attn": (False, linear_attention),
        "use_linear_cross_attn": (False, any(_levels(unet, "use_linear_cross_attn", 1))),
        "init_dim": (unet["dim"], unet["init_dim"] is not None),
        "resnet_groups": (8, set(_levels(unet, "resnet_groups", 1)) != {8}),
        "cross_embed_downsample": (False, True),  # its Unet fails to build with it
        "use_global_context_attn": (True, unet["memory_efficient"]),
        "final_resnet_block": (True, True),
        "ff_mult": (_MIDDLE_FF_MULT, unet["attend_at_middle"]),
    }
    for name, (value, matters) in only.items():
        if matters and unet[name] != value:
            raise ValueError(f"{name} is {unet[name]}, but only {value} has a counterpart here")


def unet_weights(state: Mapping[str, Tensor], config: HybridUNetConfig) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, from a state dict of imagen-pytorch's Unet.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    return match_parameters(_named(state, config), config)


def _named(state: Mapping[str, Tensor], config: HybridUNetConfig) -> Iterator[tuple[str, str, Tensor]]:
    captions = "inputs.unread." if config.unread_caption_parameters else "inputs.text."
    for name, values in state.items():
        if name.endswith(".k_scale"):
            continue
        if name.endswith(".q_scale"):
            keys = name.removesuffix("q_scale") + "k_scale"
            if keys not in state:
                raise ValueError(f"{keys} is missing")
            values, source = torch.stack([values, state[keys]]), name.removesuffix("q_scale") + "qk_gains"
        else:
            source = name
        if name.startswith("init_conv.") and name.endswith(".weight"):
            values = _in_order(values, config)
        converted = convert_name(source).replace(_LAST_IN_MIDDLE, f"middle.{1 + config.middle_attention}")
        yield name, converted.replace("inputs.text.", captions), values


def _in_order(kernel: Tensor, config: HybridUNetConfig) -> Tensor:
    """A first convolution's input channels: image, low-resolution image, estimate; imagen-pytorch has the estimate
    before the low-resolution image."""
    if not (config.low_res and config.self_conditioning) or kernel.ndim != 4:
        return kernel
    image, estimate, low_res = kernel.split(config.in_channels, dim=1)
    return torch.cat([image, low_res, estimate], dim=1)


def convert_name(name: str) -> str:
    """The name here of one of imagen-pytorch's tensors; q_scale and k_scale are one tensor here, qk_gains."""
    place = re.match(r"(downs|ups)\.(\d+)\.(\d+)\.", name)
    if place and int(place[3]) in _PLACES[place[1]]:
        way, level, number = place.groups()
        name = f"{way[:-1]}.{level}.{_PLACES[way][int(number)]}.{name[place.end() :]}"
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
