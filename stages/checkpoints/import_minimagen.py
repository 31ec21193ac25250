"""`pipeline import minimagen`: a training directory of MinImagen becomes a checkpoint per stage.

DIR/parameters/unet_0_params_*.json ... imagen_params_*.json    settings
DIR/state_dicts/unet_0_state_*.pth ...                          best weights; DIR/tmp/ where there are none
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError
from stages.checkpoints.imported import ImportedStage, explained, load_tensors, new_folder, t5_facts, write_stages

MODELS = {
    **{f"t5_{size}": f"t5-{size}" for size in ("small", "base", "large", "3b", "11b")},
    **{f"{size}1.1": f"google/t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")},
}
"""MinImagen's names of text encoders, and their names on the hub."""
_MAX_TOKENS = 256
_READ = {"text_encoder_name", "image_sizes", "timesteps", "channels", "loss_type", "lowres_sample_noise_level"}
_READ |= {"text_embed_dim", "dynamic_thresholding_percentile"}
_NOT_READ = {"cond_drop_prob", "auto_normalize_img", "only_train_unet_number"}  # they concern training only


def import_minimagen(paths: Sequence[str], *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes `OUT/unet-0`, `OUT/unet-1` ... with a checkpoint each, and `OUT/sample.yaml`, MinImagen's way to sample.

    Args:
        paths: the training directory.
        encoder_model: where its text encoder is (hub id or folder), if not on the hub under its name.
    Raises:
        ConfigError: the directory is incomplete, or has a setting without a counterpart here.
        MachineError: the text encoder cannot be found.
    """
    if len(paths) != 1:
        raise ConfigError(f"give one training directory of MinImagen (got {len(paths)} paths)")
    root, target = Path(paths[0]), new_folder(out)
    unets = [_settings(root, f"unet_{index}_") for index in range(_count(root))]
    imagen = _settings(root, "imagen_")
    unknown = sorted(imagen.keys() - _READ - _NOT_READ)
    if unknown:
        raise ConfigError(f"{root}/parameters: {', '.join(unknown)}: not a setting of MinImagen's Imagen known here")
    encoder = t5_facts(_encoder_model(imagen, encoder_model), _MAX_TOKENS, imagen.get("text_embed_dim"))
    files = [_weights_file(root, index) for index in range(len(unets))]
    stages = []
    for index, (file, settings) in enumerate(zip(files, unets, strict=True)):
        config = _denoiser(index, settings, imagen, encoder["dim"])
        network = partial(_network, file, config)
        stages.append(ImportedStage(str(file), config, _sampling(imagen), _MAX_TOKENS, network))
    return write_stages(target, stages, encoder)


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
        raise ConfigError(f"{folder}: needs one {pattern} (found {names}); leave only the one to import")
    return found[0]


def _encoder_model(imagen: Mapping[str, Any], model: str | None) -> str:
    name = imagen.get("text_encoder_name")
    if name not in MODELS and model is None:
        raise ConfigError(
            f"text_encoder_name: {name!r} is no encoder of MinImagen ({', '.join(MODELS)}); say which model it is "
            "with --encoder-model"
        )
    return model or MODELS[str(name)]


def _denoiser(index: int, settings: Mapping[str, Any], imagen: Mapping[str, Any], text_dim: int) -> Any:
    """The configuration of one stage."""
    from imagen_core.conversion.minimagen import unet_config
    from imagen_core.diffusion import DenoiserConfig

    sizes, steps, low_res = imagen["image_sizes"], imagen.get("timesteps", 1000), index > 0
    if not isinstance(steps, int):
        raise ConfigError(f"timesteps: must be one number for all UNets (got {steps})")
    schedule = {"kind": "discrete", "num_steps": steps, "beta": "linear"}
    level = imagen.get("lowres_sample_noise_level", 0.2)
    noise = {"kind": "uniform", "schedule": schedule, "per": "batch", "sample_time": level}
    with explained(f"unet_{index}: cannot be built here"):
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


def _sampling(imagen: Mapping[str, Any]) -> dict[str, Any]:
    """MinImagen's sampling: ancestral in all steps, dynamic thresholding."""
    return {
        "sampler": {"kind": "ancestral"},
        "grid": {"kind": "uniform"},
        "num_steps": imagen.get("timesteps", 1000),
        "threshold": {"kind": "dynamic", "percentile": imagen.get("dynamic_thresholding_percentile", 0.9)},
    }


def _network(weights: Path, config: Any) -> dict[str, Any]:
    """The tensors of the UNet by name."""
    from imagen_core.conversion.minimagen import unet_weights

    with explained(f"{weights}: does not fit the settings in parameters/"):
        return unet_weights(load_tensors(weights, str(weights)), config.unet)
