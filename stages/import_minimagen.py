"""`pipeline import minimagen`: a training directory of MinImagen becomes a checkpoint a stage.

DIR/parameters/unet_0_params_*.json ... imagen_params_*.json    settings
DIR/state_dicts/unet_0_state_*.pth ...                          best weights; DIR/tmp/ where there are none
"""

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import EXIT_OK, ConfigError, first_line
from pipeline.files import write_text
from stages.encoders.t5 import T5EncoderConfig
from stages.verify import CommandResult

MODELS = {
    **{f"t5_{size}": f"t5-{size}" for size in ("small", "base", "large", "3b", "11b")},
    **{f"{size}1.1": f"google/t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")},
}
"""MinImagen's names of text encoders, and theirs on the hub."""
_MAX_TOKENS = 256
_READ = {"text_encoder_name", "image_sizes", "timesteps", "channels", "loss_type", "lowres_sample_noise_level"}
_READ |= {"text_embed_dim", "dynamic_thresholding_percentile"}
_NOT_READ = {"cond_drop_prob", "auto_normalize_img", "only_train_unet_number"}  # of training


def import_minimagen(folder: str, *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes `OUT/unet-0`, `OUT/unet-1` ... with a checkpoint each, and `OUT/sample.yaml`, MinImagen's way to draw.

    Args:
        folder: the training directory.
        encoder_model: where its text encoder is (hub id or folder), if not on the hub under its name.
    Raises:
        ConfigError: the directory is not complete, or has a setting without a counterpart here.
        MachineError: the text encoder cannot be found.
    """
    root, target = Path(folder), Path(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"--out {out}: is not empty; give a new folder")
    unets = [_settings(root, f"unet_{index}_") for index in range(_count(root))]
    imagen = _settings(root, "imagen_")
    unknown = sorted(imagen.keys() - _READ - _NOT_READ)
    if unknown:
        raise ConfigError(f"{root}/parameters: {', '.join(unknown)}: not a setting of MinImagen's Imagen known here")
    encoder = _encoder(imagen, encoder_model)
    files = [_weights_file(root, index) for index in range(len(unets))]
    configs = [_denoiser(index, settings, imagen, encoder["dim"]) for index, settings in enumerate(unets)]
    for path, config in zip(files, configs, strict=True):  # before anything is written
        _tensors(path, config)
    stages, rows = [], []
    for index, (weights, config) in enumerate(zip(files, configs, strict=True)):
        path = _write(target / f"unet-{index}", weights, config, encoder)
        stages.append({"checkpoint": str(target.absolute() / f"unet-{index}"), "sampling": _sampling(imagen)})
        rows.append({"stage": index, "weights": str(weights), "checkpoint": str(path)})
    write_text(target / "sample.yaml", yaml.safe_dump({"stages": stages}, sort_keys=False))
    lines = [f"{row['weights']} -> {row['checkpoint']}" for row in rows]
    lines.append(f"draw: pipeline run sample -c {target}/sample.yaml --out pictures 'prompts=[...]'")
    return {"stages": rows, "sample": str(target / "sample.yaml")}, lines, EXIT_OK


def _count(root: Path) -> int:
    count = len(list((root / "parameters").glob("unet_*.json")))
    if not count:
        raise ConfigError(f"{root}: has no parameters/unet_0_params_*.json; give a training directory of MinImagen")
    return count


def _settings(root: Path, prefix: str) -> dict[str, Any]:
    path = _only(root / "parameters", f"{prefix}*.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: must be a JSON object of settings (got a {type(settings).__name__})")
    return settings


def _weights_file(root: Path, index: int) -> Path:
    found = any((root / "state_dicts").glob("*.pth"))
    return _only(root / ("state_dicts" if found else "tmp"), f"unet_{index}_*.pth")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"{folder}: needs one {pattern} (found {names}); leave the one to import")
    return found[0]


def _encoder(imagen: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """Name, dim, dtype and fingerprint, as of a store's text group."""
    name = imagen.get("text_encoder_name")
    if name not in MODELS and model is None:
        raise ConfigError(
            f"text_encoder_name: {name!r} is no encoder of MinImagen ({', '.join(MODELS)}); say which model it is "
            "with --encoder-model"
        )
    config = T5EncoderConfig(
        name="t5", model=model or MODELS[str(name)], max_tokens=_MAX_TOKENS, compute_dtype="float32"
    )
    identity = config.identify()
    if imagen.get("text_embed_dim") not in (None, identity.dim):
        raise ConfigError(f"text_embed_dim is {imagen['text_embed_dim']}, but {config.model} is {identity.dim} wide")
    return {"name": "t5", "dim": identity.dim, "dtype": "float32", "fingerprint": identity.fingerprint}


def _denoiser(index: int, settings: Mapping[str, Any], imagen: Mapping[str, Any], text_dim: int) -> Any:
    """The configuration of one stage."""
    from imagen_core.diffusion import DenoiserConfig
    from imagen_core.models.minimagen import unet_config

    sizes, steps, low_res = imagen["image_sizes"], imagen.get("timesteps", 1000), index > 0
    if not isinstance(steps, int):
        raise ConfigError(f"timesteps: must be one number for all UNets (got {steps})")
    schedule = {"kind": "discrete", "num_steps": steps, "beta": "linear"}
    level = imagen.get("lowres_sample_noise_level", 0.2)
    noise = {"kind": "uniform", "schedule": schedule, "per": "batch", "sample_time": level}
    try:
        channels = imagen.get("channels", 3)
        unet = unet_config(settings, text_dim=text_dim, channels=channels, low_res=low_res, size_px=sizes[index])
        return DenoiserConfig.model_validate(
            {
                "unet": unet.model_dump(),
                "diffusion": {"schedule": schedule, "objective": "eps", "loss": imagen.get("loss_type", "l2")},
                "size_px": sizes[index],
                "low_res_px": sizes[index - 1] if low_res else None,
                "low_res_noise": noise if low_res else None,
                "low_res_upsampling": "cubic_reflect" if low_res else "bicubic",
            }
        )
    except (ValidationError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"unet_{index}: cannot be built here: {error}") from error


def _sampling(imagen: Mapping[str, Any]) -> dict[str, Any]:
    """MinImagen's: ancestral sampling in all steps, dynamic thresholding."""
    return {
        "sampler": {"kind": "ancestral"},
        "grid": {"kind": "uniform"},
        "num_steps": imagen.get("timesteps", 1000),
        "threshold": {"kind": "dynamic", "percentile": imagen.get("dynamic_thresholding_percentile", 0.9)},
    }


def _tensors(weights: Path, config: Any) -> dict[str, Any]:
    """The tensors of a denoiser by name."""
    import torch

    from imagen_core.models.minimagen import unet_weights

    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ConfigError(f"{weights}: cannot be read as tensors ({first_line(error)})") from error
    try:
        return {f"net.{name}": values for name, values in unet_weights(state, config.unet).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{weights}: does not fit the settings in parameters/: {error}") from error


def _write(run: Path, weights: Path, config: Any, encoder: Mapping[str, Any]) -> Path:
    """One checkpoint, in a folder like that of a training."""
    from imagen_core.train.checkpoint import write_checkpoint

    facts = {"samples": 0, "ema_updates": 0, "loader": None, "config": {"max_tokens": _MAX_TOKENS}}
    facts |= {"denoiser": config.model_dump(mode="json"), "encoder": dict(encoder), "imported_from": str(weights)}
    return write_checkpoint(run / "checkpoints", 0, {"model": _tensors(weights, config)}, facts)
