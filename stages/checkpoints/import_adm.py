"""`pipeline import adm`: models of guided-diffusion and improved-diffusion become checkpoints of this toolkit.

64x64_diffusion.pt      the weights, as they are published, or as their trainings save them (ema_0.9999_500000.pt)
64x64_diffusion.flags   flags of the command that sampled or trained, as a README has them, if not given by --flags
config.json             settings of a model of nostalgebraist's improved-diffusion, in its folder
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError, first_line
from stages.checkpoints.imported import ImportedStage, explained, load_tensors, new_folder, write_stages

_MAX_TOKENS = 128
"""A training's own default; these models read no captions."""
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


def import_adm(
    paths: Sequence[str], *, out: str, encoder_model: str | None = None, flags: Sequence[str] = ()
) -> CommandResult:
    """Writes `OUT/unet-0`, `OUT/unet-1` ... with a checkpoint each, and `OUT/sample.yaml`, their way to sample.

    Args:
        paths: a model's file, or those of a base model and its upsamplers, in any order.
        encoder_model: refused; these models read no captions.
        flags: of each path, such as `--image_size 64 --num_channels 192`; without, they are read from a file of the
            same name that ends with .flags, or the settings from a config.json in its folder.
    Raises:
        ConfigError: a file cannot be read, or has a setting without a counterpart here.
    """
    if encoder_model is not None:
        raise ConfigError(f"--encoder-model {encoder_model}: these models read no captions; leave it out")
    if flags and len(flags) != len(paths):
        raise ConfigError(f"--flags: {len(flags)} given for {len(paths)} files; give one for each, in their order")
    target = new_folder(out)
    stages = [_stage(Path(path), text) for path, text in zip(paths, flags or [None] * len(paths), strict=True)]
    stages.sort(key=lambda stage: stage.config.size_px)
    sizes = [stage.config.size_px for stage in stages]
    if len(set(sizes)) != len(sizes):
        raise ConfigError(f"the models generate images of {sizes} pixels; give one of each size")
    return write_stages(target, stages, None)


def _stage(path: Path, text: str | None) -> ImportedStage:
    from imagen_core.conversion.adm import sampling

    low_res = _upsamples(path, _tensors(path))
    flags, saved = path.with_suffix(".flags"), path.with_name("config.json")
    where = "--flags" if text is not None else str(flags if flags.is_file() else saved)
    with explained(f"{path}: {where}"):
        if text is None and not flags.is_file():
            settings, config = _of_config(path, saved, low_res)
        else:
            settings, config = _of_flags(_read(flags) if text is None else text, low_res)
        session = sampling(settings)
    order = settings["use_new_attention_order"]
    return ImportedStage(str(path), config, session, _MAX_TOKENS, partial(_network, path, config, order))


def _of_flags(text: str, low_res: bool) -> tuple[dict[str, Any], Any]:
    from imagen_core.conversion.adm import denoiser_config, settings_of_flags

    settings = settings_of_flags(dict(parse_flags(text)), low_res=low_res)
    return settings, denoiser_config(settings, low_res=low_res)


def _of_config(path: Path, file: Path, low_res: bool) -> tuple[dict[str, Any], Any]:
    from imagen_core.conversion.nostalgebraist import MARK, denoiser_config, settings_of_config

    if not file.is_file():
        raise ConfigError(
            f"{path}: its settings are in no such file; give the flags of its README with --flags "
            f"'--image_size 64 --num_channels 192 ...', or as {path.with_suffix('.flags')}"
        )
    config = json.loads(_read(file))
    if not isinstance(config, dict) or MARK not in config:
        raise ValueError(f"has no {MARK}, so it is not of nostalgebraist's improved-diffusion; give --flags")
    settings = settings_of_config(config, low_res=low_res)
    return settings, denoiser_config(settings, low_res=low_res)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({first_line(error)})") from error


def parse_flags(text: str) -> Iterator[tuple[str, str]]:
    """Name and value of each flag; the text may also be lines of a shell that assign flags to variables."""
    words = []
    for word in shlex.split(text, comments=True):
        assigned = _ASSIGNMENT.match(word)
        words += shlex.split(word[assigned.end() :]) if assigned else [word]
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        value = value if equals else next(rest, None)
        if not word.startswith("--") or value is None or value.startswith("--"):
            raise ValueError(f"{word!r} is no flag with a value; give flags such as --image_size 64")
        yield name, value


def _network(path: Path, config: Any, new_attention_order: bool) -> dict[str, Any]:
    """The tensors of the UNet by name."""
    from imagen_core.conversion.adm_unet import unet_weights

    with explained(f"{path}: the weights do not fit the settings"):
        return unet_weights(_tensors(path), config.unet, new_attention_order=new_attention_order)


def _tensors(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give the weights of a model")
    tensors = load_tensors(path, str(path))
    if not isinstance(tensors, dict):
        raise ConfigError(f"{path}: has no tensors by name in it; give the weights of a model")
    return tensors


def _upsamples(path: Path, tensors: Mapping[str, Any]) -> bool:
    """Whether the first convolution reads two images; ConfigError if it is none of a UNet's."""
    from imagen_core.conversion.adm_unet import FIRST, LAST

    first, last = tensors.get(FIRST), tensors.get(LAST)
    if not getattr(first, "ndim", 0) == getattr(last, "ndim", 0) == 4:
        kind = "something else, such as an optimizer's state" if first is None else "a classifier"
        raise ConfigError(f"{path}: is {kind}, not a UNet of guided-diffusion or improved-diffusion; give a UNet")
    return tensors[FIRST].shape[1] not in (1, 3)
