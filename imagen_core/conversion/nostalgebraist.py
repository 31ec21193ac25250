"""Models of nostalgebraist/improved-diffusion without text, from the config.json that is saved next to them.

Their transcription and caption encoders are other networks than those here, so models with `txt` or `using_capt` are
refused, as are the parts that were added to trained models (adapters).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from imagen_core.conversion.adm import denoiser_config as adm_config
from imagen_core.conversion.adm import numbers
from imagen_core.diffusion.config import DenoiserConfig

MARK = "is_super_res"
"""A setting that each config.json has."""
_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "large_size": 256,
    "small_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "channels_per_head": 0,
    "channels_per_head_upsample": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "monochrome": False,
    "use_checkpoint": False,
    "use_checkpoint_down": False,
    "use_checkpoint_middle": False,
    "use_checkpoint_up": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "up_interp_mode": "bilinear",
    "learn_sigma": False,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": True,
    "rescale_learned_sigmas": True,
    "use_balanced_loss": False,
    "use_v_loss": False,
    "vb_loss_ratio": 1000.0,
}
_ONLY: dict[str, tuple[Any, str]] = {  # what has a counterpart here, and why nothing else
    "txt": (False, "its encoder of transcriptions is another network than the one here"),
    "using_capt": (False, "its attention to captions is another than the one here"),
    "glide_style_capt_attn": (False, "its attention to captions is another than the one here"),
    "glide_style_capt_emb": (False, "its attention to captions is another than the one here"),
    "monochrome_adapter": (False, "there are no adapters"),
    "rgb_adapter": (False, "there are no adapters"),
    "bread_adapter_at_ds": (-1, "there are no adapters"),
    "expand_timestep_base_dim": (-1, "no norm is of two parts"),
    "colorize": (False, "the image and its low-resolution image have as many channels"),
    "noise_cond": (False, "the noise on low-resolution images is in no config.json"),
    "no_attn": (False, "the middle has attention"),
    "use_snr_plus_one_loss": (False, "no weight is 1 / (SNR + 1) of the noise's error"),
}
_WITHOUT_EFFECT = {  # on models without text, or on results
    *(MARK, "tokenizer_config", "tokenizer", "verbose", "return_diffusion_factory", "text_lr_mult"),
    *("channels_last_mem", "silu_impl", "use_checkpoint_lowcost", "use_checkpoint_below_res", "max_seq_len"),
    *("bread_adapter_nearest_in", "bread_adapter_zero_conv_in", "bread_adapter_only", "no_attn_substitute_resblock"),
    *("xattn_capt", "clipname", "clip_use_penultimate_layer", "clipmod", "freeze_capt_encoder"),
    *("use_inference_caching", "post_txt_image_attn", "weave_capt", "weave_v2"),
}
_OF_TEXT = ("txt_", "cross_attn_", "weave_", "glide_style_capt_emb_")
_MULT = {32: "1,2,2,2", 64: "1,2,3,4", 256: "1,1,2,2,4,4"}
_UPSAMPLING = {"bilinear": "bilinear", "bicubic": "bicubic_unclipped", "nearest": "nearest"}


def settings_of_config(config: Mapping[str, Any], *, low_res: bool) -> dict[str, Any]:
    """All settings of a model, with their defaults, in the form of `adm.settings_of_flags`.

    Args:
        config: a config.json.
        low_res: whether it upsamples images.
    Raises:
        ValueError: a setting is unknown, or has no counterpart here.
    """
    if config[MARK] != low_res:
        raise ValueError(f"{MARK} is {config[MARK]}, but by its first convolution it is {low_res}")
    known = _DEFAULTS.keys() | _ONLY.keys() | _WITHOUT_EFFECT
    for name, value in config.items():
        if name not in known and not name.startswith(_OF_TEXT):
            raise ValueError(f"{name}: not a setting of nostalgebraist's improved-diffusion known here")
        if name in _ONLY and value != _ONLY[name][0]:
            only, why = _ONLY[name]
            raise ValueError(f"{name} is {value}, but only {only} has a counterpart here: {why}")
        if name in _DEFAULTS and not isinstance(value, _types(_DEFAULTS[name])):
            raise ValueError(f"{name} must be like {json.dumps(_DEFAULTS[name])} (got {json.dumps(value)})")
    settings = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    settings["image_size"] = size = settings["large_size" if low_res else "image_size"]
    if not settings["channel_mult"] and size not in _MULT:
        raise ValueError(f"channel_mult is not given, and has no default for {size} pixels, only for {list(_MULT)}")
    settings["channel_mult"] = numbers("channel_mult", settings["channel_mult"].strip() or _MULT[size])
    settings["attention_resolutions"] = numbers("attention_resolutions", settings["attention_resolutions"])
    return settings | {"use_new_attention_order": False, "use_ddim": False, "clip_denoised": True} | _heads(settings)


def _types(default: Any) -> Any:
    """Types of a setting's value; a truth is no number."""
    return {bool: bool, int: int, float: int | float, str: str}[type(default)]


def _heads(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of guided-diffusion's kind; the middle has num_heads, whatever channels_per_head is."""
    width, up_width = settings["channels_per_head"], settings["channels_per_head_upsample"]
    up_width = width if up_width == -1 else up_width
    if up_width > 0 and up_width != width:
        raise ValueError(
            f"channels_per_head_upsample is {up_width}, but only channels_per_head, {width}, has a counterpart here"
        )
    if width <= 0:
        return {"num_head_channels": -1}
    up = settings["num_heads_upsample"] if settings["num_heads_upsample"] != -1 else settings["num_heads"]
    return {
        "num_head_channels": width,
        "middle_num_heads": settings["num_heads"],
        "up_num_heads": None if up_width > 0 else up,
    }


def denoiser_config(settings: Mapping[str, Any], *, low_res: bool) -> DenoiserConfig:
    """The cascade stage of these settings, as `settings_of_config` gives them.

    Raises:
        ValueError: a setting has no counterpart here.
    """
    if settings["up_interp_mode"] not in _UPSAMPLING:
        raise ValueError(f"up_interp_mode is {settings['up_interp_mode']!r}, but only {list(_UPSAMPLING)} work here")
    config = adm_config(settings, low_res=low_res).model_dump()
    diffusion, ratio = config["diffusion"], settings["vb_loss_ratio"]
    if settings["use_v_loss"] or settings["use_balanced_loss"]:
        diffusion |= {"loss": "l2", "weight": "snr_plus_one"}
        diffusion["vb_weight"] = 1 / settings["diffusion_steps"] if settings["use_v_loss"] else 2 / ratio
    elif settings["rescale_learned_sigmas"]:
        diffusion["vb_weight"] = 1 / ratio
    parts = [part for part in ("down", "middle", "up") if settings[f"use_checkpoint_{part}"]]
    if parts and not settings["use_checkpoint"]:
        config["unet"] |= {"activation_checkpointing": True, "checkpointed_parts": parts}
    if low_res:
        config["low_res_upsampling"] = _UPSAMPLING[settings["up_interp_mode"]]
    made = DenoiserConfig.model_validate(config)
    _check_norms(made)
    return made


def _check_norms(config: DenoiserConfig) -> None:
    """Their norms have 24 groups, not 32, where 72 divides the channels."""
    with torch.device("meta"):
        norms = [norm for norm in config.unet.build().modules() if isinstance(norm, nn.GroupNorm)]
    wrong = sorted({norm.num_channels for norm in norms if norm.num_channels % 72 == 0})
    if wrong:
        raise ValueError(f"num_channels: norms of {wrong[0]} channels have 24 groups, but only 32 have a counterpart")
