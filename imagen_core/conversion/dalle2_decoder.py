"""The settings of a decoder of DALLE2-pytorch as denoisers' configurations (DALLE2-pytorch 1.10 to 1.15.6,
Decoder)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imagen_core.config import in_one_line
from imagen_core.conversion.dalle2_prior import LATEST, Version, check_version
from imagen_core.conversion.dalle2_unet import unet_config
from imagen_core.diffusion.config import DenoiserConfig

_DECODER: dict[str, Any] = {  # arguments of the class Decoder
    "image_size": None,
    "image_sizes": None,
    "channels": 3,
    "timesteps": 1000,
    "sample_timesteps": None,
    "loss_type": "l2",
    "beta_schedule": None,
    "predict_x_start": False,
    "predict_v": False,
    "use_noise_for_lowres_cond": False,
    "learned_variance": True,
    "learned_variance_constrain_frac": False,
    "vb_loss_weight": 0.001,
    "unconditional": False,
    "use_dynamic_thres": False,
    "dynamic_thres_percentile": 0.95,
    "p2_loss_weight_gamma": 0.0,
    "p2_loss_weight_k": 1,
    "ddim_sampling_eta": 0.0,
}
_OLDEST: Version = (1, 10)
_V: Version = (1, 12, 4)
_NOT_READ = {  # of CLIP and of training, or without effect
    *("clip", "clip_adapter_overrides", "image_cond_drop_prob", "text_cond_drop_prob", "random_crop_sizes"),
    *("use_blur_for_lowres_cond", "lowres_downsample_first", "blur_prob", "blur_sigma", "blur_kernel_size"),
    *("lowres_noise_sample_level", "clip_denoised", "clip_x_start", "auto_normalize_img"),
}


@dataclass(frozen=True, slots=True)
class DecoderUnet:
    """One UNet of a decoder.

    Attributes:
        index: its place in the decoder.
        config: the denoiser.
        sampling: how DALLE2-pytorch samples from it.
        constrained: the decoder's learned_variance_constrain_frac.
    """

    index: int
    config: DenoiserConfig
    sampling: Mapping[str, Any]
    constrained: bool


def decoder_unets(settings: Mapping[str, Any], version: Version = LATEST) -> list[DecoderUnet]:
    """The UNets of a decoder.

    Args:
        settings: arguments of its class Decoder; `unets` has those of Unet.
        version: of DALLE2-pytorch, that the decoder was trained with.
    Raises:
        ValueError: a setting is unknown, missing, or has no counterpart here.
    """
    unknown = sorted(settings.keys() - _DECODER.keys() - _NOT_READ - {"unets"})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a setting of DALLE2-pytorch 1.15.6's decoder known here")
    given = settings.get("unets")
    if not isinstance(given, list | tuple) or not all(isinstance(unet, Mapping) for unet in given) or not given:
        raise ValueError(f"unets must be a list with the settings of each UNet (got {given!r})")
    decoder = {**_DECODER, **settings}
    check_version("a decoder", version, _OLDEST)
    if decoder["predict_v"] not in (False, [False] * len(given)):
        check_version("predict_v", version, _V)
    sizes = decoder["image_sizes"] or [decoder["image_size"]]
    if len(sizes) != len(given) or None in sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"image_sizes must rise and have an entry for each of the {len(given)} unets (got {sizes})")
    noise = decoder["use_noise_for_lowres_cond"]
    if any(noise if isinstance(noise, list | tuple) else [noise and len(given) > 1]):
        raise ValueError(f"use_noise_for_lowres_cond is {noise}, but only False has a counterpart here")
    unets = []
    for index, unet in enumerate(given):
        try:
            config = _denoiser(index, unet, decoder, sizes)
            unets.append(DecoderUnet(index, config, _sampling(index, decoder), _constrained(decoder)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"unets.{index}: {in_one_line(error)}") from error
    return unets


def _denoiser(index: int, unet: Mapping[str, Any], decoder: Mapping[str, Any], sizes: list[int]) -> DenoiserConfig:
    low_res, learned = index > 0, _learns(decoder, index)
    network = unet_config(
        unet,
        channels=decoder["channels"],
        learned_variance=learned,
        low_res=low_res,
        reads_image_embed=not decoder["unconditional"] and index == 0,
        reads_text=not decoder["unconditional"] and bool(unet.get("cond_on_text_encodings")),
        size_px=sizes[index],
    )
    if low_res and sizes[index] % sizes[index - 1]:
        raise ValueError(f"{sizes[index]} px are no multiple of {sizes[index - 1]} px, which nearest resizing needs")
    range_kind = "learned_range_sigmoid" if _constrained(decoder) else "learned_range"
    objective = "x0" if _of(decoder, "predict_x_start", index) else "eps"
    gamma = _of(decoder, "p2_loss_weight_gamma", index)
    diffusion: dict[str, Any] = {
        "schedule": {"kind": "discrete", "num_steps": decoder["timesteps"], "beta": _schedule(decoder, index)},
        "objective": "v" if _of(decoder, "predict_v", index) else objective,
        "loss": decoder["loss_type"],
    }
    if learned:  # its weight is of one step's term of the bound, here of the sum of all
        diffusion |= {"variance": range_kind, "vb_weight": decoder["vb_loss_weight"] / decoder["timesteps"]}
    if gamma:
        diffusion |= {"weight": "p2", "p2_gamma": gamma, "p2_k": decoder["p2_loss_weight_k"]}
    config: dict[str, Any] = {"unet": network.model_dump(), "diffusion": diffusion, "size_px": sizes[index]}
    if low_res:
        config |= {"low_res_px": sizes[index - 1], "low_res_upsampling": "nearest"}
    return DenoiserConfig.model_validate(config)


def _constrained(decoder: Mapping[str, Any]) -> bool:
    return bool(decoder["learned_variance_constrain_frac"])


def _learns(decoder: Mapping[str, Any], index: int) -> bool:
    """UNets beyond those given have no learned variance."""
    given = decoder["learned_variance"]
    given = list(given) if isinstance(given, list | tuple) else [given]
    return bool(given[index]) if index < len(given) else False


def _schedule(decoder: Mapping[str, Any], index: int) -> str:
    """By default cosine, and linear for the last of several UNets."""
    if decoder["beta_schedule"] is None:
        return "linear" if 0 < index == len(decoder["unets"]) - 1 else "cosine"
    return _of(decoder, "beta_schedule", index)


def _sampling(index: int, decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Ancestral in all steps, or DDIM in fewer."""
    steps = _of(decoder, "sample_timesteps", index) or decoder["timesteps"]
    threshold: dict[str, Any] = {"kind": "static"}
    if decoder["use_dynamic_thres"]:
        threshold = {"kind": "dynamic", "percentile": decoder["dynamic_thres_percentile"]}
    ddim = {"kind": "ddim", "eta": decoder["ddim_sampling_eta"]}
    return {
        "sampler": {"kind": "ancestral"} if steps == decoder["timesteps"] else ddim,
        "grid": {"kind": "uniform"},
        "num_steps": steps,
        "threshold": threshold,
    }


def _of(decoder: Mapping[str, Any], name: str, index: int) -> Any:
    """A setting's value for one UNet."""
    value = decoder[name]
    if not isinstance(value, list | tuple):
        return value
    if len(value) != len(decoder["unets"]):
        raise ValueError(f"{name} has {len(value)} values for {len(decoder['unets'])} unets; give one for each")
    return value[index]
