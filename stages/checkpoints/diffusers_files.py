"""Finds and reads the files of a pipeline in diffusers' layout, in a local folder or on the hub."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, MachineError, first_line
from stages.checkpoints.imported import load_tensors

INDEX = "model_index.json"
UNET, SCHEDULER, NOISING = "unet", "scheduler", "image_noising_scheduler"
_CONFIGS = {UNET: "config.json", SCHEDULER: "scheduler_config.json", NOISING: "scheduler_config.json"}
_STEM = "diffusion_pytorch_model"
_WEIGHTS = re.compile(rf"{_STEM}(?:\.(\w+))?(?:-(\d+)-of-(\d+))?\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class PipelineFiles:
    """A pipeline that was found.

    Attributes:
        name: as the user gave it.
        folder: the folder of its files.
        class_name: the pipeline's class.
        configs: the content of unet/config.json and scheduler/scheduler_config.json, and of
            image_noising_scheduler/scheduler_config.json if there is one, by folder.
        weights: the files of the UNet.
    """

    name: str
    folder: Path
    class_name: str
    configs: dict[str, dict[str, Any]]
    weights: tuple[Path, ...]

    def unet_tensors(self) -> dict[str, Any]:
        """The UNet's tensors by name; no code from a file runs.

        Raises:
            ConfigError: a file cannot be read, or two files have a tensor of one name.
        """
        found: dict[str, Any] = {}
        for file in self.weights:
            tensors = _read_tensors(file)
            if twice := sorted(found.keys() & tensors.keys()):
                raise ConfigError(f"{file}: has {twice[0]}, which another part has too; download the parts again")
            found |= tensors
        return found


def find_pipeline(place: str, classes: Iterable[str]) -> PipelineFiles:
    """The files of a pipeline whose class is one of `classes`.

    A hub pipeline that is in the local cache needs no network; `HF_HUB_OFFLINE=1` is respected. Only the UNet and the
    small files are downloaded.

    Args:
        place: a local folder, or a hub id.
    Raises:
        ConfigError: it is no such pipeline, or incomplete.
        MachineError: it is neither a local folder nor a reachable hub id.
    """
    folder = Path(place)
    if folder.is_dir():
        return _read(place, folder, classes)
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise ConfigError(f"{place}: is not a folder; give a pipeline saved by diffusers, or a hub id")
    return _hub(place, classes)


def _read(place: str, folder: Path, classes: Iterable[str]) -> PipelineFiles:
    class_name = _check_class(place, folder / INDEX, classes)
    configs = {part: _json(folder / part / name) for part, name in _CONFIGS.items() if part != NOISING}
    if (folder / NOISING).is_dir():
        configs[NOISING] = _json(folder / NOISING / _CONFIGS[NOISING])
    names = [path.name for path in (folder / UNET).iterdir() if path.is_file()]
    weights = tuple(folder / UNET / name for name in weight_files(names, f"{folder / UNET}"))
    return PipelineFiles(place, folder, class_name, configs, weights)


def _check_class(place: str, index: Path, classes: Iterable[str]) -> str:
    name = _json(index).get("_class_name")
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(
            f"{place}: {INDEX} names {f'a {name}' if name else 'no class'}, and only {' and '.join(classes)} can be "
            "imported: a latent model, or the latent upscaler that is used as stage III, has no counterpart here"
        )
    return name


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: is missing; give a complete pipeline in diffusers' layout") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({first_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must be a JSON object (got a {type(content).__name__})")
    return content


def weight_files(names: Iterable[str], where: str) -> list[str]:
    """Which of these names are the weights to read: safetensors before .bin, full precision before a variant such as
    fp16, one file before parts.

    Raises:
        ConfigError: there are none, or a part is missing.
    """
    found: dict[tuple[bool, str, int], dict[int, str]] = {}
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            variant, part, count, kind = match.groups()
            key = (kind == "bin", variant or "", int(count or 0))
            found.setdefault(key, {})[int(part or 0)] = name
    if not found:
        raise ConfigError(f"{where}: has no {_STEM}.safetensors or .bin; give a complete pipeline")
    (_, _, count), parts = min(found.items())
    if missing := sorted(set(range(1, count + 1)) - parts.keys()):
        raise ConfigError(f"{where}: part {missing[0]} of {count} of {_STEM} is missing; download it again")
    return [parts[number] for number in sorted(parts)]


def _read_tensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import Tensor

    if file.suffix != ".safetensors":
        content = load_tensors(file, str(file))
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ConfigError(f"{file}: is not a mapping from names to tensors; give the weights of a UNet")
        return content
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as safetensors ({first_line(error)}); download it again") from error


def _hub(place: str, classes: Iterable[str]) -> PipelineFiles:
    from huggingface_hub import snapshot_download

    small = [INDEX, *(f"{part}/{name}" for part, name in _CONFIGS.items())]
    try:
        cached = Path(snapshot_download(place, local_files_only=True, allow_patterns=[*small, f"{UNET}/{_STEM}*"]))
    except (OSError, ValueError):
        cached = None  # not in the cache
    if cached is not None and (cached / INDEX).is_file():
        _check_class(place, cached / INDEX, classes)
        with suppress(ConfigError):  # incomplete: ask the hub
            return _read(place, cached, classes)
    try:
        return _online(place, small, classes)
    except ConfigError:
        raise
    except Exception as error:
        raise MachineError(
            f"{place!r} is neither a local folder, nor cached, nor reachable on the hub ({type(error).__name__}); "
            f"download it once with `hf download {place}` (a gated one after login and licence), or give a folder"
        ) from error


def _online(place: str, small: list[str], classes: Iterable[str]) -> PipelineFiles:
    """Downloads the small files, then of the UNet's weights only those that are read."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(place)
    folder = Path(snapshot_download(place, revision=info.sha, allow_patterns=small))
    _check_class(place, folder / INDEX, classes)
    names = _names_in(UNET, (sibling.rfilename for sibling in info.siblings or []))
    wanted = [f"{UNET}/{name}" for name in weight_files(names, f"{place}/{UNET}")]
    folder = Path(snapshot_download(place, revision=info.sha, allow_patterns=[*small, *wanted]))
    return _read(place, folder, classes)


def _names_in(folder: str, paths: Iterable[str]) -> Iterator[str]:
    return (path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/"))
