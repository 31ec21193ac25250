"""`pipeline export --to diffusers`: a cascade as a folder that diffusers opens without this package."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import save_file

from imagen_core.cascade import CascadeStage
from imagen_core.files import share
from imagen_core.models import Conditioning
from imagen_core.text_batch import each_encoder
from pipeline.commands import CommandResult
from pipeline.config import load_config, local_path
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.storage.files import commit_folder, unfinished_folder, write_json, write_text
from pipeline.units import human_bytes
from stages.checkpoints.imported import check_new
from stages.sampling.cascade import LoadedCascade, load_cascade
from stages.sampling.config import SampleConfig, SampleStageConfig
from stages.sampling.diffusers.card import model_card
from stages.sampling.diffusers.deepfloyd import Dtype, is_deepfloyd, write_deepfloyd
from stages.sampling.diffusers.encoder import export_encoder
from stages.sampling.diffusers.graph import trace
from stages.sampling.diffusers.steps import sampling_table

_FILES = Path(__file__).with_name("files")
_CODE = ("pipeline.py", "cascade_sampling.py")
_DIFFUSERS_VERSION = "0.42.1"
"""The version whose layout is written."""
_MOST_STAGES = 4
_CONDITIONS = ("text", "labels", "low_res")

Writer = Callable[[LoadedCascade, Path, str | None], None]
"""Writes a cascade into a new folder; the last argument is where the text encoder is, if the user said so."""


def export_diffusers(
    places: Sequence[str],
    *,
    out: str,
    weights: str | None = None,
    sampling: Path | None = None,
    encoder_model: str | None = None,
    dtype: str | None = None,
) -> CommandResult:
    """Writes the trained stages of a cascade as a folder for `DiffusionPipeline.from_pretrained`; all or nothing.

    Args:
        places: run folders or checkpoints of the stages, smallest images first.
        weights: `model`, or one of the averages; None means the slowest average of each.
        sampling: configuration of `pipeline run sample`, of which only how the stages sample is read.
        encoder_model: where the text encoder is: a folder, which is copied, or a hub id, which is named.
        dtype: of the weights of DeepFloyd IF's networks, float32 if None; others keep theirs.
    Raises:
        ConfigError: checkpoints that are missing, or do not fit together, or that no such folder can hold; or a folder
            that is not new.
        MachineError: the text encoder cannot be found.
    """
    target = local_path(out, "--out")
    check_new(target, out)
    loaded = _load(places, weights, sampling)
    write = writer_of(loaded, dtype)
    with unfinished_folder(target) as temporary:
        check_new(target, out)  # another process may have ended meanwhile
        write(loaded, temporary, encoder_model)
        for path in temporary.rglob("*.safetensors"):
            share(path)
        commit_folder(temporary, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    stages = [
        {"size_px": at.size_px, **origin} for at, origin in zip(loaded.cascade.stages, _origins(loaded), strict=True)
    ]
    lines = [f"{each['weights']} of step {each['step']}, {each['size_px']} px" for each in stages]
    lines.append(f"-> {out} ({human_bytes(size)}); README.md there says how to use it")
    return {"folder": out, "bytes": size, "stages": stages}, lines, EXIT_OK


def writer_of(loaded: LoadedCascade, dtype: str | None = None) -> Writer:
    """What writes this cascade: networks that diffusers has go out in its own layout, others with their own code.

    Raises:
        ConfigError: an unknown dtype, or one for networks with their own code.
    """
    if dtype not in (None, *get_args(Dtype)):
        raise ConfigError(f"--dtype {dtype}: must be {', '.join(get_args(Dtype))}")
    if is_deepfloyd(loaded):
        return partial(write_deepfloyd, dtype=cast(Dtype, dtype or "float32"))
    if dtype is not None:
        raise ConfigError(
            f"--dtype {dtype}: is for DeepFloyd IF's networks; give torch_dtype where the folder is opened"
        )
    return write_folder


def _load(places: Sequence[str], weights: str | None, sampling: Path | None) -> LoadedCascade:
    """The cascade; ConfigError if its stages do not follow each other."""
    settings: list[dict[str, Any]] = [{} for _ in places]
    if sampling is not None:
        stages = load_config(SampleConfig, sampling).stages
        if len(stages) != len(places):
            raise ConfigError(
                f"--sampling {sampling}: has {len(stages)} stages for {len(places)} checkpoints; give one for each"
            )
        guides = [number for number, stage in enumerate(stages) if stage.guide is not None]
        if guides:
            raise ConfigError(
                f"--sampling {sampling}: stages.{guides[0]}.guide: an exported stage has one model; leave guide and "
                "guidance.autoguidance out"
            )
        settings = [{"sampling": stage.sampling} for stage in stages]
    try:
        loaded = load_cascade(
            [
                SampleStageConfig(checkpoint=place, weights=weights, **each)
                for place, each in zip(places, settings, strict=True)
            ]
        )
    except ConfigError as error:
        named = re.sub(r"^stages\.(\d+)\.checkpoint: ", lambda found: f"PATH {places[int(found[1])]}: ", str(error))
        raise ConfigError(named) from error
    before: CascadeStage | None = None
    for place, stage in zip(places, loaded.cascade.stages, strict=True):
        if before is not None and stage.config.low_res_px != before.size_px:
            reads = "none" if stage.config.low_res_px is None else f"those of {stage.config.low_res_px} px"
            raise ConfigError(
                f"PATH {place}: would super-resolve images of {before.size_px} px, but was trained on {reads}; "
                "give stages of which each continues the one before"
            )
        before = stage
    return loaded


def write_folder(loaded: LoadedCascade, folder: Path, encoder_model: str | None) -> None:
    """Writes a cascade with the code that runs it.

    Raises:
        ConfigError: it has a part that the code lacks.
        MachineError: the text encoder cannot be found.
    """
    stages = loaded.cascade.stages
    if len(stages) > _MOST_STAGES:
        raise ConfigError(f"PATH: {len(stages)} stages, and such a folder holds {_MOST_STAGES}; export fewer")
    for stage in stages:
        _check_parts(stage)
    folder.mkdir(exist_ok=True)
    record = next(iter(each_encoder(loaded.cascade.encoder)), None)
    encoder = export_encoder(record, encoder_model, folder)
    names = [f"stage_{number}" for number in range(1, _MOST_STAGES + 1)]
    index: dict[str, Any] = {"_class_name": ["pipeline", "CascadePipeline"], "_diffusers_version": _DIFFUSERS_VERSION}
    index |= dict.fromkeys((*names, "text_encoder", "tokenizer"), (None, None))
    index |= dict.fromkeys(names[: len(stages)], ("network", "Network"))
    index["empty_caption"] = any(stage.config.unet.needs_empty_caption for stage in stages)
    write_json(folder / "model_index.json", index | dict(encoder.components) | dict(encoder.settings))
    for stage, name in zip(stages, names, strict=False):
        _write_stage(stage, folder / name)
    for name in _CODE:
        write_text(folder / name, (_FILES / name).read_text(encoding="utf-8"))
    write_text(folder / "README.md", model_card(stages, loaded.checkpoints, encoder))


def _check_parts(stage: CascadeStage) -> None:
    """ConfigError for what `files/pipeline.py` cannot give to a network."""
    unet, prefix = stage.config.unet, f"the {stage.size_px} px stage"
    for option, is_used, why in (
        ("text_dim", len(unet.text_shapes) > 1, "reads captions by several encoders"),
        ("transcription", unet.transcription is not None, "reads transcriptions"),
        ("image_embed_dim", unet.image_embed_dim is not None, "reads image embeddings, which a prior generates"),
        ("text_embed_dim", unet.text_embed_dim is not None, "reads captions as one vector by a second encoder"),
        ("self_conditioning", unet.self_conditioning, "reads its previous estimate"),
        ("condition_channels", unet.condition_channels > 0, "reads further images"),
    ):
        if is_used:
            raise ConfigError(
                f"{prefix}: {why} (unet.{option}), which the exported code lacks; use `pipeline run sample`"
            )
    if stage.sampling.threshold.kind == "length":
        raise ConfigError(f"{prefix}: threshold.kind=length is for a prior's embeddings; use dynamic or static")


def _write_stage(stage: CascadeStage, folder: Path) -> None:
    try:
        graph, table = trace(stage), sampling_table(stage)
    except ValueError as error:
        raise ConfigError(f"the {stage.size_px} px stage: {error}") from error
    settings, config = stage.sampling, stage.config
    sampling = {
        "size_px": config.size_px,
        "divisor": config.unet.sides_divisor,
        "channels": config.shape[0],
        "conditions": [name for name in _CONDITIONS if name in stage.conditions],
        "text_shape": list(config.unet.text_shapes[0] if config.unet.text_shapes else ()),
        "max_tokens": stage.max_tokens,
        "guidance": {name: getattr(settings.guidance, name) for name in _CONDITIONS},
        "threshold": settings.threshold.model_dump(mode="json"),
        "sigmoid": config.diffusion.variance == "learned_range_sigmoid",
        "low_res": _low_res(stage),
        "table": table,
    }
    folder.mkdir()
    constants = {name: str(graph.tensors[name].dtype).removeprefix("torch.") for name in graph.constants}
    write_json(
        folder / "config.json",
        {
            "_class_name": "Network",
            "_diffusers_version": _DIFFUSERS_VERSION,
            "graph": graph.lines,
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "tensors": {name: list(tensor.shape) for name, tensor in graph.tensors.items()},
            "buffers": constants,
            "sampling": sampling,
        },
    )
    save_file(graph.tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_text(folder / "network.py", (_FILES / "network.py").read_text(encoding="utf-8"))


def _low_res(stage: CascadeStage) -> dict[str, Any] | None:
    """How the low-resolution image of a stage is prepared; None for a base."""
    config, noise = stage.config, stage.config.low_res_noise
    if config.low_res_px is None:
        return None
    given = stage.sampling.low_res_sigma
    sigma = 0.0 if noise is None else noise.sampling_sigma if given is None else given
    level = torch.zeros(1, 3, 1, 1)
    denoiser = stage.denoiser
    conditioning = denoiser.with_sampling_low_res(Conditioning(), level, level, sigma)
    c_noise = conditioning.low_res_noise
    return {
        "size_px": config.low_res_px,
        "upsampling": config.low_res_upsampling,
        "noise_first": noise is not None and config.low_res_noise_at == "low_res_px",
        "sigma": None if noise is None else sigma,
        "scale": float(denoiser.coefficients(torch.tensor([sigma])).input),
        "c_noise": 0.0 if c_noise is None else float(c_noise),
    }


def _origins(loaded: LoadedCascade) -> list[dict[str, object]]:
    return [{"step": each.step, "weights": each.weights} for each in loaded.checkpoints]
