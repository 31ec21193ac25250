"""MinImagen's UNets as Hybrid UNets: settings and weights (AssemblyAI's MinImagen 0.0.6, minimagen/Unet.py)."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from imagen_core.conversion.weights import match_parameters
from imagen_core.models.hybrid.unet import HybridUNetConfig
from imagen_core.models.presets.hybrid import MINIMAGEN

_READ = {
    *("dim", "dim_mults", "channels", "channels_out", "cond_dim", "text_embed_dim", "num_resnet_blocks"),
    *("layer_attns", "layer_cross_attns", "attn_heads", "lowres_cond", "memory_efficient", "attend_at_middle"),
}
_LAST_IN_MIDDLE = "middle.last"  # its index depends on whether attention comes before it
_PLACES = {  # the modules of a level by index, on the way down and up
    "downs": {0: "before", 1: "first.layer", 2: "blocks", 3: "transformer", 4: "after"},
    "ups": {0: "first.layer", 1: "blocks", 2: "transformer", 3: "after"},
}
_RULES = (  # MinImagen's names -> names here; each is applied once, in this order
    (r"^null_text_embed$", "inputs.text.null_tokens"),
    (r"^null_text_hidden$", "inputs.text.null_vector"),
    (r"^to_lowres_time_", "inputs.low_res_level.to_time_"),
    (r"^to_time_", "inputs.level.to_time_"),
    (r"to_time_hiddens\.1\.", "hidden.0."),
    (r"to_time_cond\.0\.", "to_vector."),
    (r"to_time_tokens\.0\.", "to_tokens."),
    (r"^norm_cond\.", "inputs.norm."),
    (r"^text_to_cond\.", "inputs.text.to_context."),
    (r"^to_text_non_attn_cond\.", "inputs.text.to_vector."),
    (r"^init_conv\.", "conv_in."),
    (r"^mid_block1\.", "middle.0.layer."),
    (r"^mid_attn\.fn\.fn\.", "middle.1.layers.0."),
    (r"^mid_block2\.", f"{_LAST_IN_MIDDLE}.layer."),
    (r"^final_res_block\.", "final.layer."),
    (r"^final_conv\.", "conv_out."),
    (r"(blocks\.\d+)\.", r"\1.layer."),
    (r"^(up\.\d+\.after)\.1\.", r"\1.conv."),
    (r"\.after\.fns\.0\.", ".after.wide."),
    (r"\.after\.fns\.1\.", ".after.narrow."),
    (r"\.time_mlp\.1\.", ".time."),
    (r"\.block([12])\.groupnorm\.", r".norm\1."),
    (r"\.block([12])\.project\.", r".conv\1."),
    (r"\.res_conv\.", ".skip."),
    (r"\.cross_attn\.fn\.to_kv\.", ".cross_attn.fn.context_to_kv."),
    (r"\.cross_attn\.fn\.", ".text_attention."),
    (r"\.transformer\.attn\.fn\.", ".transformer.layers.0."),
    (r"\.transformer\.ff\.", ".transformer.layers.0.feed_forward."),
    (r"(text_attention|layers\.0)\.(null_kv|to_q|to_kv|context_to_kv|to_out\.0)", r"\1.attention.\2"),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.to_out\.1\.gamma$", ".norm_out.weight"),
    (r"\.norm\.gamma$", ".norm.weight"),
    (r"\.g$", ".weight"),
)


def unet_config(
    settings: Mapping[str, Any], *, text_dim: int, channels: int, low_res: bool, size_px: int
) -> HybridUNetConfig:
    """A Hybrid UNet like the one MinImagen builds in a cascade.

    Args:
        settings: arguments of its class Unet, without those that the cascade decides.
        text_dim, channels, low_res, size_px: decided by the cascade; size_px is the side of the images in pixels.
    Raises:
        ValueError: a setting is unknown or has no counterpart here.
    """
    unknown = sorted(settings.keys() - _READ)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a setting of MinImagen 0.0.6's Unet")
    dim_mults = tuple(settings.get("dim_mults", (1, 2, 4)))

    def levels(name: str, default: int | bool) -> tuple[Any, ...]:
        value = settings.get(name, default)
        return tuple(value) if isinstance(value, list | tuple) else (value,) * len(dim_mults)

    return HybridUNetConfig.model_validate(
        {
            **MINIMAGEN,
            "image_size_px": size_px,
            "dim": settings.get("dim", 128),
            "dim_mults": dim_mults,
            "in_channels": channels,
            "out_channels": channels,
            "num_res_blocks": levels("num_resnet_blocks", 1),
            "attention_levels": levels("layer_attns", True),
            "cross_attention_levels": levels("layer_cross_attns", True),
            "cond_dim": settings.get("cond_dim"),
            "text_dim": text_dim,
            "num_heads": settings.get("attn_heads", 8),
            "cross_num_heads": 8,
            "middle_attention": settings.get("attend_at_middle", False),
            "middle_feed_forward": not settings.get("attend_at_middle", False),
            "memory_efficient": settings.get("memory_efficient", False),
            "low_res": low_res,
            "low_res_noise": low_res,
        }
    )


def unet_weights(state: Mapping[str, Tensor], config: HybridUNetConfig) -> dict[str, Tensor]:
    """The parameters of `config.build()`, by name, from a state dict of MinImagen's Unet.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    return match_parameters(_named(state, last_in_middle=1 + config.middle_attention), config)


def _named(state: Mapping[str, Tensor], *, last_in_middle: int) -> Iterator[tuple[str, str, Tensor]]:
    for name, values in state.items():
        if name.endswith(".beta"):  # buffers of norms without bias
            if values.any():
                raise ValueError(f"{name} is not zero, but MinImagen never trains it")
            continue
        converted = convert_name(name).replace(_LAST_IN_MIDDLE, f"middle.{last_in_middle}")
        if converted.endswith("hidden.0.weight"):  # MinImagen has sines first, this library cosines
            values = values.roll(values.shape[1] // 2, dims=1)
        yield name, converted, values


def convert_name(name: str) -> str:
    """The name here of one of MinImagen's tensors."""
    place = re.match(r"(downs|ups)\.(\d+)\.(\d+)\.", name)
    if place:
        way, level, number = place.groups()
        name = f"{way[:-1]}.{level}.{_PLACES[way][int(number)]}.{name[place.end() :]}"
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
