"""The settings of an imagen-pytorch cascade as denoisers' configurations (imagen-pytorch 1.24.2 to 2.1.0,
imagen_pytorch.py and elucidated_imagen.py)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imagen_core.config import in_one_line
from imagen_core.conversion.imagen_pytorch_unet import unet_config
from imagen_core.diffusion.config import DenoiserConfig
from imagen_core.models.hybrid.unet import HybridUNetConfig

_COMMON: dict[str, Any] = {
    "text_encoder_name": "google/t5-v1_1-base",
    "text_embed_dim": None,
    "channels": 3,
    "condition_on_text": True,
    "dynamic_thresholding": True,
    "dynamic_thresholding_percentile": 0.95,
    "lowres_noise_schedule": "linear",
    "lowres_sample_noise_level": 0.2,
    "per_sample_random_aug_noise_level": False,
    "resize_mode": "nearest",
    "video": False,
}
_ORIGINAL = _COMMON | {
    "timesteps": 1000,
    "loss_type": "l2",
    "noise_schedules": "cosine",
    "pred_objectives": "noise",
    "min_snr_loss_weight": True,
    "min_snr_gamma": 5,
}
_ELUCIDATED = _COMMON | {
    "num_sample_steps": 32,
    "sigma_min": 0.002,
    "sigma_max": 80,
    "sigma_data": 0.5,
    "rho": 7,
    "P_mean": -1.2,
    "P_std": 1.2,
    "S_churn": 80,
    "S_tmin": 0.05,
    "S_tmax": 50,
    "S_noise": 1.003,
}
_NOT_READ = {  # of training and of video
    *("cond_drop_prob", "auto_normalize_img", "only_train_unet_number", "random_crop_sizes"),
    *("temporal_downsample_factor", "resize_cond_video_frames"),
}
_SCHEDULES = {"cosine": "log_snr_cosine", "linear": "log_snr_linear"}
_OBJECTIVES = {"noise": "eps", "x_start": "x0", "v": "v"}
_UPSAMPLING = {"nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic"}
_NEVER_REACHED = 1e12  # a signal-to-noise ratio


@dataclass(frozen=True, slots=True)
class CascadeUnet:
    """One UNet of a cascade.

    Attributes:
        index: its place in the cascade.
        config: the denoiser.
        sampling: how imagen-pytorch samples from it.
    """

    index: int
    config: DenoiserConfig
    sampling: Mapping[str, Any]


def cascade_settings(imagen: Mapping[str, Any], *, elucidated: bool) -> dict[str, Any]:
    """The settings of an Imagen or ElucidatedImagen, with the defaults of those left out.

    Raises:
        ValueError: a setting is unknown, missing, or has no counterpart here.
    """
    kind, defaults = ("ElucidatedImagen", _ELUCIDATED) if elucidated else ("Imagen", _ORIGINAL)
    unknown = sorted(imagen.keys() - defaults.keys() - _NOT_READ - {"unets", "image_sizes"})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a setting of imagen-pytorch 2.1.0's {kind}")
    for name in ("unets", "image_sizes"):
        if not isinstance(imagen.get(name), list | tuple) or not imagen[name]:
            raise ValueError(f"{name} must be a list with an entry for each UNet (got {imagen.get(name)!r})")
    settings = {**defaults, **imagen}
    if len(settings["unets"]) != len(settings["image_sizes"]):
        sizes = len(settings["image_sizes"])
        raise ValueError(f"there are {len(settings['unets'])} unets for {sizes} image_sizes; give one for each")
    if settings["video"]:
        raise ValueError("video is true, but only models of images have a counterpart here")
    return settings


def cascade_unets(
    imagen: Mapping[str, Any], *, elucidated: bool, text_dim: int | None, group_norm: bool = False
) -> list[CascadeUnet]:
    """The UNets of an Imagen or ElucidatedImagen but for placeholders (NullUnet).

    Args:
        imagen: `cascade_settings`.
        text_dim: width of the text encoder's embeddings; None for a model without captions.
        group_norm: the ResBlocks have group norms, as before version 2.
    Raises:
        ValueError: a setting has no counterpart here.
    """
    unets = []
    for index, unet in enumerate(imagen["unets"]):
        if not isinstance(unet, Mapping):
            raise ValueError(f"unets: must be settings by name (got {unet!r})")
        if unet.get("is_null"):
            continue
        try:
            network = unet_config(
                unet,
                text_dim=text_dim,
                channels=imagen["channels"],
                low_res=index > 0,
                size_px=imagen["image_sizes"][index],
                group_norm=group_norm,
            )
            config = _denoiser(index, network, imagen, elucidated=elucidated)
            sampling = _sampling(index, imagen, elucidated=elucidated)
        except (ValueError, TypeError) as error:
            raise ValueError(f"unets.{index}: {in_one_line(error)}") from error
        unets.append(CascadeUnet(index, config, sampling))
    return unets


def _denoiser(index: int, network: HybridUNetConfig, imagen: Mapping[str, Any], *, elucidated: bool) -> DenoiserConfig:
    size = network.image_size_px
    diffusion = (_elucidated if elucidated else _original)(index, imagen)
    config: dict[str, Any] = {"unet": network.model_dump(), "diffusion": diffusion, "size_px": size}
    if network.low_res:
        small, mode = imagen["image_sizes"][index - 1], _known("resize_mode", imagen["resize_mode"], _UPSAMPLING)
        if mode == "nearest" and size % small:
            raise ValueError(f"resize_mode is nearest, but {size} px are no multiple of {small} px")
        config |= {
            "low_res_px": small,
            "low_res_upsampling": mode,
            "low_res_scale": "variance_preserving" if elucidated else "input",
            "low_res_noise": {
                "kind": "uniform",
                "schedule": {"kind": _known("lowres_noise_schedule", imagen["lowres_noise_schedule"], _SCHEDULES)},
                "per": "sample" if imagen["per_sample_random_aug_noise_level"] else "batch",
                "sample_time": imagen["lowres_sample_noise_level"],
            },
        }
    return DenoiserConfig.model_validate(config)


def _original(index: int, imagen: Mapping[str, Any]) -> dict[str, Any]:
    """Continuous time, with min-SNR weights unless they are switched off."""
    objective = _known("pred_objectives", _of(imagen, "pred_objectives", index), _OBJECTIVES)
    weight: dict[str, Any] = {"weight": "min_snr", "min_snr_gamma": _of(imagen, "min_snr_gamma", index)}
    if not _of(imagen, "min_snr_loss_weight", index):
        weight = {"weight": "none"} if objective == "eps" else weight | {"min_snr_gamma": _NEVER_REACHED}
    return {
        "schedule": {"kind": _known("noise_schedules", _schedule(index, imagen), _SCHEDULES)},
        "objective": objective,
        "loss": imagen["loss_type"],
        **weight,
    }


def _schedule(index: int, imagen: Mapping[str, Any]) -> str:
    """Schedules that are not given are cosine for the first two UNets, and linear for the others."""
    given = imagen["noise_schedules"]
    given = list(given) if isinstance(given, list | tuple) else [given]
    return given[index] if index < len(given) else ("cosine" if index < 2 else "linear")


def _elucidated(index: int, imagen: Mapping[str, Any]) -> dict[str, Any]:
    names = {"mean": "P_mean", "std": "P_std", "sigma_min": "sigma_min", "sigma_max": "sigma_max"}
    schedule = {name: _of(imagen, theirs, index) for name, theirs in names.items()}
    return {
        "schedule": {"kind": "log_normal", **schedule},
        "objective": "edm",
        "sigma_data": _of(imagen, "sigma_data", index),
    }


def _sampling(index: int, imagen: Mapping[str, Any], *, elucidated: bool) -> dict[str, Any]:
    """EDM's Heun steps with churn; or ancestral steps down to the lowest level, and one to 0."""
    threshold: dict[str, Any] = {"kind": "static"}
    if _of(imagen, "dynamic_thresholding", index):
        threshold = {"kind": "dynamic", "percentile": imagen["dynamic_thresholding_percentile"]}
    if not elucidated:
        steps = _of(imagen, "timesteps", index) + 1
        return {
            "sampler": {"kind": "ancestral"},
            "grid": {"kind": "uniform"},
            "num_steps": steps,
            "threshold": threshold,
        }
    steps = _of(imagen, "num_sample_steps", index)
    sampler = {
        "kind": "heun",
        "churn": min(_of(imagen, "S_churn", index) / steps, math.sqrt(2) - 1),
        "churn_sigma_min": _of(imagen, "S_tmin", index),
        "churn_sigma_max": _of(imagen, "S_tmax", index),
        "churn_noise": _of(imagen, "S_noise", index),
    }
    grid = {"kind": "karras", "rho": _of(imagen, "rho", index)}
    return {"sampler": sampler, "grid": grid, "num_steps": steps, "threshold": threshold}


def _of(imagen: Mapping[str, Any], name: str, index: int) -> Any:
    """A setting's value for one UNet."""
    value = imagen[name]
    if not isinstance(value, list | tuple):
        return value
    if len(value) != len(imagen["unets"]):
        raise ValueError(f"{name} has {len(value)} values for {len(imagen['unets'])} unets; give one for each")
    return value[index]


def _known(name: str, value: Any, names: Mapping[str, str]) -> str:
    if value not in names:
        raise ValueError(f"{name} must be {', '.join(names)} (got {value!r})")
    return names[value]
