"""`pipeline import nemo`: checkpoints of NVIDIA NeMo's Imagen become checkpoints of this toolkit.

base.nemo    a tar with model_config.yaml and model_weights.ckpt; of a run with model parallelism with
             mp_rank_00/model_weights.ckpt, mp_rank_01/... (no layer of Imagen is split: each has the complete model)
base.ckpt    Lightning's, with state_dict; the settings in base.yaml next to it, else in its hyper_parameters
"""

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError, first_line
from stages.checkpoints.imported import ImportedStage, explained, load_tensors, new_folder, t5_facts, write_stages

ENCODER = "google-t5/t5-11b"
"""NeMo's text encoder."""
_ENCODED_TOKENS = 512
"""Tokens of a caption that it encodes, before they are truncated to token_length."""
_EDM_STEPS = 50
_SETTINGS, _WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_DEVICE = r"(?:(?:mp_rank_\d+|tp_rank_\d+_pp_rank_\d+)/)?"


def import_nemo(paths: Sequence[str], *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes `OUT/unet-0`, `OUT/unet-1` ... with a checkpoint each, and `OUT/sample.yaml`, NeMo's way to sample.

    Args:
        paths: one .nemo or .ckpt per stage, in any order.
        encoder_model: where its text encoder is (hub id or folder), if it is not T5-11B from the hub.
    Raises:
        ConfigError: a file cannot be read, or has a setting without a counterpart here.
        MachineError: the text encoder cannot be found.
    """
    target = new_folder(out)
    stages = sorted((_stage(Path(path)) for path in paths), key=lambda stage: stage.config.size_px)
    sizes = [stage.config.size_px for stage in stages]
    if len(set(sizes)) != len(sizes):
        raise ConfigError(f"the models generate images of {sizes} pixels; give one of each size")
    widths = {stage.config.unet.text_width for stage in stages}
    if len(widths) != 1:
        raise ConfigError(f"the models read embeddings of different widths ({widths}), so not of one text encoder")
    encoder = t5_facts(encoder_model or ENCODER, _ENCODED_TOKENS, widths.pop())
    return write_stages(target, stages, encoder)


def _stage(path: Path) -> ImportedStage:
    from imagen_core.conversion.nemo import denoiser_config, preconditioning

    if path.suffix not in (".nemo", ".ckpt"):
        raise ConfigError(f"{path}: give a .nemo or .ckpt of NeMo")
    model = _settings_of_nemo(path) if path.suffix == ".nemo" else _settings_of_ckpt(path)
    with explained(f"{path}: cannot be built here"):
        config, sampling = denoiser_config(model), _sampling(preconditioning(model))
    max_tokens = model["conditioning"]["token_length"]
    return ImportedStage(str(path), config, sampling, max_tokens, partial(_network, path, config))


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """NeMo's sampling: Heun's method of EDM, or DDPM's ancestral steps down to the lowest level and one to 0."""
    threshold = {"kind": "dynamic", "percentile": 0.995}
    if settings["kind"] == "EDM":
        session = {"sampler": {"kind": "heun"}, "grid": {"kind": "karras", "rho": 7.0}, "num_steps": _EDM_STEPS}
    else:
        steps = settings["timesteps"] + 1
        session = {"sampler": {"kind": "ancestral"}, "grid": {"kind": "uniform"}, "num_steps": steps}
    return {**session, "threshold": threshold}


def _network(path: Path, config: Any) -> dict[str, Any]:
    """The tensors of the UNet by name."""
    from imagen_core.conversion.nemo_unet import unet_weights

    if path.suffix == ".nemo":
        state = _weights_of_nemo(path)
    else:
        state = _checkpoint(path)["state_dict"]
    with explained(f"{path}: the weights do not fit the settings"):
        return unet_weights(state, config.unet)


def _settings_of_nemo(path: Path) -> Mapping[str, Any]:
    _, settings = next(_members(path, _SETTINGS, yaml.safe_load))
    return _model(settings, f"{path}: {_SETTINGS}")


def _weights_of_nemo(path: Path) -> Any:
    """The state dict of a .nemo; of several equal ones, by device, the first."""
    first, state = "", None
    for name, copy in _members(path, _WEIGHTS, partial(load_tensors, name=str(path))):
        if state is None:
            first, state = name, copy
        elif differing := _differing(state, copy):
            raise ConfigError(
                f"{path}: {differing} is not the same in {first} and {name}, although no layer of NeMo's Imagen is "
                "split over devices; leave one of these files in the archive"
            )
    return state


def _differing(state: Mapping[str, Any], copy: Mapping[str, Any]) -> str | None:
    """The first tensor that two state dicts do not share; None if there is none."""
    import torch

    for name in sorted({*state, *copy}):
        pair = state.get(name), copy.get(name)
        if not all(isinstance(values, torch.Tensor) for values in pair) or not torch.equal(*pair):  # type: ignore[arg-type]
            return name
    return None


def _members(path: Path, name: str, read: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """Reads the files of this name in a .nemo in place: nothing is unpacked, and no name in it becomes a path.

    Names and contents: of the model, or of each device in the archive's order.
    """
    number = 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                shown = member.name.removeprefix("./")
                if member.isfile() and re.fullmatch(_DEVICE + re.escape(name), shown):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield shown, read(file)
                    number += 1
    except (OSError, EOFError, tarfile.TarError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a .nemo ({first_line(error)})") from error
    if not number:
        raise ConfigError(f"{path}: has no {name} in it; give a .nemo of NeMo Imagen")


def _settings_of_ckpt(path: Path) -> Mapping[str, Any]:
    beside = path.with_suffix(".yaml")
    if beside.exists():
        try:
            return _model(yaml.safe_load(beside.read_text(encoding="utf-8")), str(beside))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{beside}: cannot be read ({first_line(error)})") from error
    settings = plain(_checkpoint(path).get("hyper_parameters"))
    if settings is None:
        raise ConfigError(f"{path}: has no hyper_parameters in it; put the YAML it was trained with at {beside}")
    return _model(settings, f"{path}: hyper_parameters")


def _model(settings: Any, where: str) -> Mapping[str, Any]:
    """The part of a configuration that describes the model."""
    for name in ("cfg", "model"):
        if isinstance(settings, dict) and name in settings:
            settings = settings[name]
    if not isinstance(settings, dict) or "unet" not in settings:
        raise ConfigError(f"{where}: has no unet in it; give a model of NeMo Imagen")
    return settings


def _checkpoint(path: Path) -> dict[str, Any]:
    import torch

    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; a folder is not read, and NeMo's Imagen saves none")
    with torch.serialization.safe_globals([(Inert, name) for name in _INERT]):
        checkpoint = load_tensors(path, str(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ConfigError(f"{path}: has no state_dict in it; give a .ckpt of NeMo")
    return checkpoint


_INERT = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any"),
    *("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.bool"),
    "collections.defaultdict",
)
"""Classes that settings pickled by omegaconf name; none of them is imported."""


class Inert:
    """Stands in for an object of omegaconf; its attributes are the pickled state."""

    def __init__(self, *_: object):
        pass


def plain(settings: Any) -> Any:
    """Settings pickled by omegaconf as plain dicts, lists and values."""
    if isinstance(settings, Inert):
        content = vars(settings)
        settings = content.get("_content", content.get("_val"))
    if isinstance(settings, Mapping):
        return {name: plain(value) for name, value in settings.items()}
    return [plain(value) for value in settings] if isinstance(settings, list | tuple) else settings
