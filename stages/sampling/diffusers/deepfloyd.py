"""A cascade of DeepFloyd IF's networks as pipelines of diffusers itself, which need no code of this package.

FOLDER/stage-1/   IFPipeline: model_index.json, unet/, scheduler/; text_encoder/ and tokenizer/ where they are given
FOLDER/stage-2/   IFSuperResolutionPipeline: the same, and image_noising_scheduler/
FOLDER/README.md  what it is, and how it is used
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from imagen_core.cascade import CascadeStage, SamplingConfig
from imagen_core.conversion.deepfloyd import (
    noising_settings,
    not_expressible,
    published_sampling,
    scheduler_settings,
)
from imagen_core.conversion.deepfloyd_unet import CLASS, diffusers_weights, unet_settings
from imagen_core.files import share
from imagen_core.text_batch import each_encoder
from imagen_core.train import LoadedDenoiser
from pipeline.errors import ConfigError
from pipeline.storage.files import write_json, write_text
from stages.checkpoints.diffusers_files import INDEX, NOISING, SCHEDULER, UNET
from stages.encoders.batches.tokens import load_tokenizer
from stages.encoders.identity import identity_changes
from stages.encoders.prompts import encoder_of
from stages.sampling.cascade import LoadedCascade

Dtype = Literal["float32", "float16", "bfloat16"]
"""Type of the written weights."""
_CLASSES = {False: "IFPipeline", True: "IFSuperResolutionPipeline"}  # by whether a stage super-resolves
_NOT_INCLUDED = ("feature_extractor", "safety_checker", "watermarker")
_MODEL_FILES = re.compile(r"config\.json|(model|pytorch_model).*\.(safetensors|bin|index\.json)")


def is_deepfloyd(loaded: LoadedCascade) -> bool:
    """Whether diffusers' own classes have every stage: a base, one super-resolution, or both."""
    stages = loaded.cascade.stages
    kinds = {stage.is_super_resolution for stage in stages}
    return len(kinds) == len(stages) and all(not_expressible(stage.config) is None for stage in stages)


def write_deepfloyd(
    loaded: LoadedCascade, folder: Path, encoder_model: str | None, *, dtype: Dtype = "float32"
) -> None:
    """Writes `folder/stage-1` and `folder/stage-2`, of those stages that there are, and `folder/README.md`.

    Args:
        loaded: a cascade that `is_deepfloyd`.
        encoder_model: a local folder of the text encoder, which becomes part of the first pipeline; None: README.md
            names it.
    Raises:
        ConfigError: `encoder_model` is no folder, or another encoder.
        MachineError: the text encoder cannot be found.
    """
    encoder = next(iter(each_encoder(loaded.cascade.encoder)), None)
    for index, (stage, checkpoint) in enumerate(zip(loaded.cascade.stages, loaded.checkpoints, strict=True)):
        below, is_upsampler = folder / _name(stage), stage.is_super_resolution
        scheduler = _scheduler(stage)
        parts: dict[str, Any] = {SCHEDULER: ("diffusers", scheduler["_class_name"]), UNET: ("diffusers", CLASS)}
        parts |= dict.fromkeys((*_NOT_INCLUDED, "text_encoder", "tokenizer"), (None, None))
        write_json(below / UNET / "config.json", unet_settings(_unet(stage)))
        write_json(below / SCHEDULER / "scheduler_config.json", scheduler)
        if is_upsampler:
            parts[NOISING] = ("diffusers", "DDPMScheduler")
            write_json(below / NOISING / "scheduler_config.json", noising_settings(stage.config))
        if encoder_model is not None and index == 0:
            parts |= _include_encoder(encoder_model, encoder, below)
        settings = {"_class_name": _CLASSES[is_upsampler], "requires_safety_checker": False}
        write_json(below / INDEX, settings | dict(sorted(parts.items())))
        _write_weights(below / UNET / "diffusion_pytorch_model.safetensors", stage, checkpoint, dtype)
    write_text(folder / "README.md", _card(loaded, dtype, includes_encoder=encoder_model is not None))


def _name(stage: CascadeStage) -> str:
    return "stage-2" if stage.is_super_resolution else "stage-1"


def _session(stage: CascadeStage) -> SamplingConfig:
    """How a stage samples: as --sampling says, else as IF's own pipelines do."""
    if stage.sampling != SamplingConfig():
        return stage.sampling
    return SamplingConfig.model_validate(published_sampling(low_res=stage.is_super_resolution))


def _scheduler(stage: CascadeStage) -> dict[str, Any]:
    try:
        return scheduler_settings(stage.config, _session(stage).model_dump(mode="json"))
    except ValueError as error:
        raise ConfigError(
            f"--sampling: the {stage.size_px} px stage: {error} in diffusers' pipelines of DeepFloyd IF"
        ) from error


def _unet(stage: CascadeStage) -> Any:
    return stage.config.unet


def _write_weights(file: Path, stage: CascadeStage, checkpoint: LoadedDenoiser, dtype: Dtype) -> None:
    tensors = diffusers_weights(checkpoint.denoiser.net.state_dict(), _unet(stage))
    kind: torch.dtype = getattr(torch, dtype)
    too_large = [name for name, values in tensors.items() if not values.to(kind).isfinite().all()]
    if too_large:
        raise ConfigError(f"--dtype {dtype}: {too_large[0]} has values that are not finite in it; use float32")
    save_file({name: values.to(kind) for name, values in tensors.items()}, file, metadata={"format": "pt"})
    share(file)


def _include_encoder(model: str, encoder: Mapping[str, Any] | None, folder: Path) -> dict[str, tuple[str, str]]:
    """Puts the text encoder into a pipeline's folder, and returns its entries in model_index.json."""
    place = Path(model)
    if not place.is_dir():
        raise ConfigError(f"--encoder-model {model}: is not a folder; download it first, or leave it out")
    if encoder is None:
        raise ConfigError(f"--encoder-model {model}: the stages were trained without a text encoder; leave it out")
    config = encoder_of(encoder, model, use_gpu=False)
    changes = identity_changes(encoder["fingerprint"], config.identify().fingerprint)
    changes = [change for change in changes if not change.startswith(("model:", "revision:"))]
    if changes:
        raise ConfigError(f"--encoder-model {model}: is not the encoder of the training: {'; '.join(changes)}")
    files = [path for path in sorted(place.iterdir()) if _MODEL_FILES.fullmatch(path.name)]
    (folder / "text_encoder").mkdir(parents=True)
    for path in files:  # no links: who saves into an exported folder must not change the model it was made from
        shutil.copyfile(path, folder / "text_encoder" / path.name)
    with config.located() as found:
        tokenizer = load_tokenizer(found)
        tokenizer.save_pretrained(folder / "tokenizer")
    # the name of the common class: transformers 4 has no other for a tokenizer that is only a tokenizer.json
    return {
        "text_encoder": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "PreTrainedTokenizerFast" if tokenizer.is_fast else type(tokenizer).__name__),
    }


_CARD = """\
---
license: unknown
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffusion, if]
---

# DeepFloyd IF, {sizes}

Pipelines of diffusers, exported from imagen-precompute. Weights that were trained further from DeepFloyd's fall under
DeepFloyd's licence; the field above is to be filled in by whoever publishes the model.

| folder | pipeline | images | parameters of the UNet | weights |
|---|---|---|---|---|
{rows}

{encoder}

```python
import torch
from diffusers import DiffusionPipeline

{usage}
```
"""
_INCLUDED = "The text encoder is in `{name}`; its embeddings are for every stage."
_NAMED = (
    "The text encoder is not included; captions were encoded by {model}. Load it as a `T5EncoderModel`, with its "
    "tokenizer, and give both to `from_pretrained` of the first pipeline (`text_encoder=`, `tokenizer=`)."
)
_LOAD = '{variable} = DiffusionPipeline.from_pretrained("FOLDER/{name}", torch_dtype=torch.{dtype})'
_ENCODE = 'text, empty = {variable}.encode_prompt("a red fox in the snow")'
_RUN = """\
images = {variable}(
    {image}prompt_embeds=text,
    negative_prompt_embeds=empty,
    num_inference_steps={steps},
    guidance_scale={guidance}{more},
).images"""


def _card(loaded: LoadedCascade, dtype: Dtype, *, includes_encoder: bool) -> str:
    """The text of README.md."""
    stages, encoder = loaded.cascade.stages, next(iter(each_encoder(loaded.cascade.encoder)), None)
    rows, load, run = [], [], []
    for number, (stage, checkpoint) in enumerate(zip(stages, loaded.checkpoints, strict=True)):
        upsamples, is_last = stage.is_super_resolution, number == len(stages) - 1
        count = sum(parameter.numel() for parameter in checkpoint.denoiser.parameters())
        images = f"{stage.config.low_res_px} to {stage.size_px} px" if upsamples else f"{stage.size_px} px"
        cells = (f"`{_name(stage)}`", _CLASSES[upsamples], images, f"{count:,}")
        rows.append(f"| {' | '.join(cells)} | {checkpoint.weights} of step {checkpoint.step:,}, {dtype} |")
        variable = "upsampler" if upsamples else "base"
        load.append(_LOAD.format(variable=variable, name=_name(stage), dtype=dtype))
        image = "image=images,\n    " if number else "image=SMALL_IMAGES,\n    " if upsamples else ""
        session, more = _session(stage), "" if is_last else ',\n    output_type="pt"'
        steps, guidance = session.num_steps, session.guidance.text
        run.append(_RUN.format(variable=variable, image=image, steps=steps, guidance=guidance, more=more))
    encode = _ENCODE.format(variable="upsampler" if stages[0].is_super_resolution else "base")
    model = "an encoder that is not recorded" if encoder is None else f"`{encoder['fingerprint']['model']}`"
    remark = _INCLUDED.format(name=_name(stages[0])) if includes_encoder else _NAMED.format(model=model)
    sizes = " and ".join(f"{stage.size_px} px" for stage in stages)
    return _CARD.format(sizes=sizes, rows="\n".join(rows), encoder=remark, usage="\n".join([*load, encode, *run]))
