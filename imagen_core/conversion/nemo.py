"""The settings of a NeMo Imagen model as a denoiser's configuration (nemo_toolkit 1.23.0, imagen.py, precond.py)."""

from collections.abc import Mapping
from typing import Any

from imagen_core.conversion.nemo_unet import unet_config
from imagen_core.diffusion.config import DenoiserConfig

_EDM = {"loss_type": "l2", "sigma_data": 0.5, "p_mean": -1.2, "p_std": 1.2}
_DDPM = {"loss_type": "l2", "pred_objective": "noise", "noise_schedule": "cosine", "timesteps": 1000}
_SCHEDULES = {"cosine": "log_snr_cosine", "linear": "log_snr_linear"}
_OBJECTIVES = {"noise": "eps", "x_start": "x0"}
_FACTOR = 4
"""Factor of super-resolution: NeMo trains all of these models on images of 256 px and 64 px, also on crops."""


def preconditioning(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `preconditioning` section of a model's configuration with NeMo's defaults, and its `kind`, EDM or DDPM.

    Raises:
        ValueError: the kind or a setting is unknown.
    """
    kind = model.get("preconditioning_type", "DDPM")
    if kind not in ("EDM", "DDPM"):
        raise ValueError(f"preconditioning_type must be EDM or DDPM (got {kind!r})")
    defaults, settings = _EDM if kind == "EDM" else _DDPM, model.get("preconditioning") or {}
    unknown = sorted(settings.keys() - defaults.keys())
    if unknown:
        raise ValueError(f"preconditioning: {', '.join(unknown)}: not a setting of NeMo 1.23.0's {kind}")
    return {**defaults, **settings, "kind": kind}


def denoiser_config(model: Mapping[str, Any]) -> DenoiserConfig:
    """The cascade stage that corresponds to a model of NeMo.

    Args:
        model: its configuration, the `model` section of the YAML; settings of training and data are not read.
    Raises:
        ValueError: a setting is missing, unknown, or has no counterpart here.
    """
    for name, settings in (("unet", ("embed_dim", "image_size")), ("conditioning", ("embed_dim", "token_length"))):
        missing = [key for key in settings if key not in (model.get(name) or {})]
        if missing:
            raise ValueError(f"{name}.{missing[0]} is missing; give the configuration of a model of NeMo Imagen")
    unet_type, noise = model.get("unet_type", "base"), bool(model.get("noise_cond_aug", False))
    unet = unet_config(
        model["unet"],
        unet_type=unet_type,
        text_dim=model["conditioning"]["embed_dim"],
        token_length=model["conditioning"]["token_length"],
        low_res_noise=noise,
    )
    settings = preconditioning(model)
    if settings["kind"] == "EDM":
        schedule = {"kind": "log_normal", "mean": settings["p_mean"], "std": settings["p_std"]}
        diffusion = {"schedule": schedule, "objective": "edm", "sigma_data": settings["sigma_data"]}
    else:
        if noise:
            raise ValueError("noise_cond_aug is true, which NeMo's DDPM does not support")
        schedule = {"kind": _known("noise_schedule", settings, _SCHEDULES)}
        diffusion = {"schedule": schedule, "objective": _known("pred_objective", settings, _OBJECTIVES)}
    config: dict[str, Any] = {
        "unet": unet.model_dump(),
        "diffusion": {**diffusion, "loss": settings["loss_type"]},
        "size_px": unet.image_size_px,
    }
    if unet.low_res:
        config |= {"low_res_px": unet.image_size_px // _FACTOR, "low_res_upsampling": "bicubic_unclipped"}
    if noise:
        config |= {"low_res_noise": {"kind": "lognormal", "schedule": schedule}, "low_res_noise_at": "low_res_px"}
    return DenoiserConfig.model_validate(config)


def _known(name: str, settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    if settings[name] not in names:
        raise ValueError(f"preconditioning.{name} must be {' or '.join(names)} (got {settings[name]!r})")
    return names[settings[name]]
