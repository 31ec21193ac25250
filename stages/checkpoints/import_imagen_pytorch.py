"""`pipeline import imagen-pytorch`: checkpoints of imagen-pytorch's trainer become checkpoints of this toolkit.

imagen.pt      of ImagenTrainer.save: the weights of all UNets, their averages, and the settings (imagen_type and
               imagen_params), if the model was made from a configuration
imagen.json    the settings of one that was not: {"type": "original" or "elucidated", "imagen": {...}}
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError, first_line
from stages.checkpoints.imported import ImportedStage, explained, load_tensors, new_folder, t5_facts, write_stages

_ENCODED_TOKENS = 256
"""Tokens of a caption that it encodes, before they are truncated to max_text_len."""
_OLDEST = (1, 24, 2)
_TYPES = {"original": False, "elucidated": True}


def import_imagen_pytorch(paths: Sequence[str], *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes `OUT/unet-0`, `OUT/unet-1` ... with a checkpoint each, and `OUT/sample.yaml`, its way to sample.

    Args:
        paths: files of ImagenTrainer.save; several, if the UNets of a cascade were trained apart.
        encoder_model: where its text encoder is (hub id or folder), if not on the hub under its name.
    Raises:
        ConfigError: a file cannot be read, or has a setting without a counterpart here.
        MachineError: the text encoder cannot be found.
    """
    target = new_folder(out)
    cascades = [(Path(path), *_settings(Path(path))) for path in paths]
    encoder = _encoder([(path, imagen) for path, imagen, _ in cascades], encoder_model)
    stages = [stage for cascade in cascades for stage in _stages(*cascade, encoder)]
    stages.sort(key=lambda stage: stage.config.size_px)
    sizes = [stage.config.size_px for stage in stages]
    if not sizes or len(set(sizes)) != len(sizes):
        raise ConfigError(
            f"the UNets generate images of {sizes} pixels; give one of each size, and no placeholders only"
        )
    return write_stages(target, stages, encoder)


def _settings(path: Path) -> tuple[dict[str, Any], bool]:
    """The settings of the cascade in a file, and whether it is an ElucidatedImagen."""
    from imagen_core.conversion.imagen_pytorch import cascade_settings

    checkpoint, beside = _checkpoint(path), path.with_suffix(".json")
    version = tuple(int(number) for number in re.findall(r"\d+", str(checkpoint.get("version"))))
    if not version:
        raise ConfigError(f"{path}: names no version; give a checkpoint of ImagenTrainer.save, which does")
    if version < _OLDEST:
        raise ConfigError(
            f"{path}: is of version {checkpoint.get('version')} of imagen-pytorch, which computed something else than "
            f"those since {'.'.join(map(str, _OLDEST))}; only these have a counterpart here"
        )
    where, kind, imagen = f"{path}: imagen_params", checkpoint.get("imagen_type"), checkpoint.get("imagen_params")
    if imagen is None:
        if not beside.is_file():
            raise ConfigError(
                f"{path}: has no imagen_params in it; put its settings at {beside}: "
                '{"type": "original" or "elucidated", "imagen": {"unets": [...], "image_sizes": [...], ...}}'
            )
        where, kind, imagen = f"{beside}: imagen", *_read_settings(beside)
    if kind not in _TYPES:
        raise ConfigError(f"{where}: its type must be original or elucidated (got {kind!r})")
    if not isinstance(imagen, Mapping):
        raise ConfigError(f"{where}: must be settings by name (got {imagen!r})")
    with explained(where):
        return cascade_settings(imagen, elucidated=_TYPES[kind]), _TYPES[kind]


def _read_settings(path: Path) -> tuple[Any, Any]:
    """The type and the settings of a configuration of imagen-pytorch's command line, or of an ImagenTrainerConfig."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(settings, dict) or "imagen" not in settings:
        raise ConfigError(f"{path}: has no imagen in it; give a configuration of imagen-pytorch")
    return settings.get("type", "elucidated" if settings.get("elucidated") else "original"), settings["imagen"]


def _encoder(cascades: Sequence[tuple[Path, Mapping[str, Any]]], model: str | None) -> dict[str, Any] | None:
    """The text encoder of all cascades; None if none reads captions."""
    found = {
        (imagen["text_encoder_name"], imagen["text_embed_dim"]): path
        for path, imagen in cascades
        if imagen["condition_on_text"]
    }
    if len({name for name, _ in found}) > 1:
        names = ", ".join(f"{path}: {name}" for (name, _), path in found.items())
        raise ConfigError(f"the models read captions of different text encoders ({names}); import them apart")
    encoder = None
    for name, dim in found:
        encoder = t5_facts(model or name, _ENCODED_TOKENS, dim)
    return encoder


def _stages(
    path: Path, imagen: Mapping[str, Any], elucidated: bool, encoder: Mapping[str, Any] | None
) -> list[ImportedStage]:
    from imagen_core.conversion.imagen_pytorch import cascade_unets

    text_dim = encoder["dim"] if encoder is not None and imagen["condition_on_text"] else None
    group_norm = any(".groupnorm." in name for name in _checkpoint(path)["model"])
    with explained(f"{path}: cannot be built here"):
        unets = cascade_unets(imagen, elucidated=elucidated, text_dim=text_dim, group_norm=group_norm)
    return [
        ImportedStage(
            str(path),
            unet.config,
            unet.sampling,
            imagen["unets"][unet.index].get("max_text_len", _ENCODED_TOKENS),
            partial(_network, path, unet.index, unet.config),
        )
        for unet in unets
    ]


def _network(path: Path, index: int, config: Any) -> dict[str, Any]:
    """The tensors of a UNet by name: their average, if there is one that was updated."""
    from imagen_core.conversion.imagen_pytorch_unet import unet_weights

    checkpoint = _checkpoint(path)
    averages, prefix = checkpoint.get("ema") or {}, f"{index}.ema_model."
    tensors = checkpoint["model"]
    if averages.get(f"{index}.initted"):
        tensors = averages
    else:
        prefix = f"unets.{index}."
    state = {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}
    with explained(f"{path}: the weights of unets.{index} do not fit the settings"):
        return unet_weights(state, config.unet)


def _checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a checkpoint of ImagenTrainer.save")
    checkpoint = load_tensors(path, str(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ConfigError(f"{path}: has no model in it; give a checkpoint of ImagenTrainer.save")
    return checkpoint
