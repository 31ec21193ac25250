"""Stages with a UNet of DeepFloyd IF as pipelines that diffusers opens.

OUT/stage-1/   IFPipeline: model_index.json, unet/, scheduler/; text_encoder/ and tokenizer/ where they are given
OUT/stage-2/   IFSuperResolutionPipeline: the same, and image_noising_scheduler/
OUT/README.md  what it is, and how it is used
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from imagen_core.train import CheckpointError, LoadedDenoiser
from pipeline.commands import CommandResult
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.storage.files import make_folder, write_text
from pipeline.units import human_bytes
from stages.checkpoints.diffusers_files import INDEX, NOISING, SCHEDULER, UNET
from stages.checkpoints.imported import link_files, new_folder, write_folder
from stages.checkpoints.load import load_checkpoint_from

if TYPE_CHECKING:
    from torch import Tensor

    from imagen_core.diffusion import DenoiserConfig

Dtype = Literal["float32", "float16", "bfloat16"]
_README = "README.md"
_CLASSES = {1: "IFPipeline", 2: "IFSuperResolutionPipeline"}
_NOT_INCLUDED = ("feature_extractor", "safety_checker", "watermarker")
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.json|.*\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
)
_MODEL_FILES = re.compile(r"config\.json|(model|pytorch_model).*\.(safetensors|bin|json)")


def export_deepfloyd(
    places: Sequence[str],
    *,
    out: str,
    weights: str | None = None,
    encoder_model: str | None = None,
    dtype: Dtype = "float32",
) -> CommandResult:
    """Writes `OUT/stage-1` and `OUT/stage-2`, of those stages that are given, and `OUT/README.md`; all or nothing.

    Args:
        places: a trained stage each, in any order: a run folder, a checkpoint, or an exported file.
        weights: which of their weights; None: the slowest average.
        encoder_model: a local folder of the text encoder, which is included; None: README.md names it.
        dtype: of the tensors.
    Raises:
        ConfigError: there is no such checkpoint, diffusers has no such network, the stages do not fit together, the
            text encoder is another one, or OUT holds something else.
        MachineError: the text encoder cannot be found.
    """
    target = new_folder(out, _README)
    models = _loaded(places, weights)
    encoder = models[min(models)].encoder
    files = None if encoder_model is None else _encoder_files(encoder_model, encoder)

    def write(folder: Path) -> CommandResult:
        rows = []
        for number, model in models.items():
            included = files if number == min(models) else None
            size = _write_stage(folder / f"stage-{number}", number, model, included, dtype)
            rows.append({"stage": number, "folder": f"{target}/stage-{number}", "class": _CLASSES[number], "bytes": size})
        write_text(folder / _README, _card(models, encoder, dtype, includes_encoder=files is not None))
        lines = [f"{row['class']} -> {row['folder']} ({human_bytes(int(str(row['bytes'])))})" for row in rows]
        lines.append(f"open: DiffusionPipeline.from_pretrained({rows[0]['folder']!r})")
        return {"stages": rows, "dtype": dtype}, lines, EXIT_OK

    return write_folder(target, write, "export")


def _loaded(places: Sequence[str], weights: str | None) -> dict[int, LoadedDenoiser]:
    """The stages by number, I before II."""
    from imagen_core.conversion.deepfloyd import not_expressible

    found: dict[int, LoadedDenoiser] = {}
    for place in places:
        try:
            model = load_checkpoint_from(place, weights)
            config = model.stage
        except CheckpointError as error:
            raise ConfigError(f"{place}: {error}".replace(f"{place}: {place}", place)) from error
        if reason := not_expressible(config):
            raise ConfigError(f"{place}: diffusers has no pipeline of DeepFloyd IF like it: {reason}")
        number = 1 + config.unet.low_res
        if number in found:
            kind = "super-resolution stage" if number == 2 else "base model"
            raise ConfigError(f"{place}: is a second {kind}; export one after the other")
        found[number] = model
    if len(found) == 2:
        _check_together(found[1], found[2])
    return dict(sorted(found.items()))


def _check_together(base: LoadedDenoiser, upsampler: LoadedDenoiser) -> None:
    from stages.encoders.identity import record_changes

    sizes = base.stage.size_px, upsampler.stage.low_res_px
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the base generates images of {sizes[0]} px, but the other stage upsamples {sizes[1]} px")
    if changes := record_changes(base.encoder or {}, upsampler.encoder or {}):
        raise ConfigError(f"the stages were trained with two text encoders: {'; '.join(changes)}; take two of one")


def _encoder_files(model: str, encoder: Mapping[str, Any] | None) -> dict[str, list[Path]]:
    """The files of a text encoder and of its tokenizer, by the folder they go to; after a check that it is the one."""
    from stages.encoders.identity import identity_changes
    from stages.encoders.prompts import encoder_of

    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(f"--encoder-model {model}: is not a folder; to include the text encoder, download it first")
    if encoder is None:
        raise ConfigError(f"--encoder-model {model}: the stages were trained without a text encoder; leave it out")
    found = encoder_of(encoder, model, use_gpu=False).identify().fingerprint
    changes = identity_changes(encoder["fingerprint"], found)
    if changes := [change for change in changes if not change.startswith(("model:", "revision:"))]:
        raise ConfigError(f"--encoder-model {model}: is not the one of the training: {'; '.join(changes)}")
    names = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "text_encoder": [path for path in names if _MODEL_FILES.fullmatch(path.name)],
        "tokenizer": [path for path in names if _TOKENIZER_FILES.fullmatch(path.name)],
    }


def _write_stage(
    folder: Path, number: int, model: LoadedDenoiser, files: Mapping[str, list[Path]] | None, dtype: Dtype
) -> int:
    """Writes one pipeline, and returns the size of its UNet's weights in bytes."""
    from imagen_core.conversion.deepfloyd import noising_settings, scheduler_settings
    from imagen_core.conversion.deepfloyd_unet import CLASS, unet_settings

    config = model.stage
    parts: dict[str, list[str | None]] = {SCHEDULER: ["diffusers", "DDPMScheduler"], UNET: ["diffusers", CLASS]}
    parts |= {name: [None, None] for name in (*_NOT_INCLUDED, "text_encoder", "tokenizer")}
    _write_json(folder / UNET / "config.json", unet_settings(config.unet))
    _write_json(folder / SCHEDULER / "scheduler_config.json", scheduler_settings(config))
    if number == 2:
        parts[NOISING] = ["diffusers", "DDPMScheduler"]
        _write_json(folder / NOISING / "scheduler_config.json", noising_settings(config))
    if files is not None:
        parts |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "AutoTokenizer"]}
        for name, paths in files.items():
            link_files(paths, folder / name)
    index = {"_class_name": _CLASSES[number], "requires_safety_checker": False, **dict(sorted(parts.items()))}
    _write_json(folder / INDEX, index)
    return _write_weights(folder / UNET / "diffusion_pytorch_model.safetensors", model, config, dtype)


def _write_weights(file: Path, model: LoadedDenoiser, config: "DenoiserConfig", dtype: Dtype) -> int:
    import torch
    from safetensors.torch import save_file

    from imagen_core.conversion.deepfloyd_unet import diffusers_weights
    from imagen_core.files import share

    tensors: dict[str, Tensor] = dict(model.denoiser.net.state_dict())
    converted = diffusers_weights(tensors, config.unet)  # type: ignore[arg-type]
    save_file(
        {name: values.to(getattr(torch, dtype)) for name, values in converted.items()}, file, metadata={"format": "pt"}
    )
    share(file)
    return file.stat().st_size


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    make_folder(path.parent)
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
