"""`pipeline import diffusers`: DeepFloyd IF's pipelines become a checkpoint per stage.

FOLDER/model_index.json             IFPipeline (stage I) or IFSuperResolutionPipeline (stage II)
FOLDER/unet/                        config.json, diffusion_pytorch_model*.safetensors or .bin, also in parts
FOLDER/scheduler/                   scheduler_config.json
FOLDER/image_noising_scheduler/     the same, of stage II
FOLDER/text_encoder/, tokenizer/    the text encoder, where they are there
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError, MachineError, first_line
from pipeline.storage.scratch import temporary_folder
from stages.checkpoints.diffusers_files import NOISING, SCHEDULER, UNET, PipelineFiles, find_pipeline
from stages.checkpoints.imported import ImportedStage, explained, link_files, new_folder, t5_facts, write_stages
from stages.encoders.recipes.shipped import recipes

CLASSES = ("IFPipeline", "IFSuperResolutionPipeline")
"""The classes of stages I and II."""
RECIPE = "deepfloyd-if"
"""What IF's pipelines do around their text encoder."""
_ENCODER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def import_diffusers(paths: Sequence[str], *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes `OUT/unet-0`, `OUT/unet-1` ... with a checkpoint each, and `OUT/sample.yaml`, their way to sample.

    Args:
        paths: a folder or hub id for each stage, in any order.
        encoder_model: where the text encoder is (hub id or folder), if it is not in a pipeline's folder, and not
            T5-XXL from the hub.
    Raises:
        ConfigError: a pipeline is of another kind or incomplete, or has a setting without a counterpart here.
        MachineError: a pipeline or the text encoder cannot be found.
    """
    target = new_folder(out)
    found = sorted((find_pipeline(path, CLASSES) for path in paths), key=lambda pipe: CLASSES.index(pipe.class_name))
    if len(found) > len({pipe.class_name for pipe in found}):
        raise ConfigError(f"{found[-1].name}: is a second {found[-1].class_name}; give one pipeline for each stage")
    stages = _stages(found)
    widths = {stage.config.unet.text_dim for stage in stages}
    if len(widths) != 1:
        raise ConfigError(f"the stages read embeddings of different widths ({widths}), so not of one text encoder")
    width = widths.pop()
    assert width is None or isinstance(width, int)
    settings = dict(recipes()[RECIPE]["settings"])
    model, max_tokens = settings.pop("model"), settings.pop("max_tokens")
    files = [] if encoder_model is not None else _text_encoder([pipe.folder for pipe in found])
    if not files:
        encoder = t5_facts(encoder_model or model, max_tokens, width, **settings)
        return write_stages(target, stages, encoder)
    return write_stages(target, stages, _facts(files, max_tokens, width, settings), files)


def _facts(files: Sequence[Path], max_tokens: int, width: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`t5_facts` of an encoder whose model and tokenizer are in two folders; errors name the model's."""
    with temporary_folder() as parent:
        joined = parent / "text_encoder"
        link_files(files, joined)
        try:
            return t5_facts(str(joined), max_tokens, width, **settings)
        except (ConfigError, MachineError) as error:
            raise type(error)(str(error).replace(str(joined), str(files[0].parent))) from error


def _stages(found: Sequence[PipelineFiles]) -> list[ImportedStage]:
    from imagen_core.conversion.deepfloyd import denoiser_config, sampling
    from imagen_core.conversion.deepfloyd_unet import MAX_TOKENS

    stages: list[ImportedStage] = []
    for pipe in found:
        configs, below = pipe.configs, stages[-1].config.size_px if stages else None
        with explained(f"{pipe.name}: cannot be built here"):
            config = denoiser_config(configs[UNET], configs[SCHEDULER], configs.get(NOISING), below)
            session = sampling(configs[SCHEDULER], low_res=config.unet.low_res)
        if config.unet.low_res != (pipe.class_name == CLASSES[1]):
            raise ConfigError(
                f"{pipe.name}: is a {pipe.class_name}, but its UNet reads {configs[UNET]['in_channels']} channels"
            )
        stages.append(ImportedStage(pipe.name, config, session, MAX_TOKENS, partial(_network, pipe, config)))
    return stages


def _network(pipe: PipelineFiles, config: Any) -> dict[str, Any]:
    """The tensors of the UNet by name."""
    from imagen_core.conversion.deepfloyd_unet import unet_weights

    with explained(f"{pipe.folder / UNET}: the weights do not fit config.json"):
        return unet_weights(pipe.unet_tensors(), config.unet)


def _text_encoder(folders: Sequence[Path]) -> list[Path]:
    """The files of the first complete text encoder and tokenizer of these pipelines; none if none has both."""
    for folder in folders:
        model, tokenizer = folder / "text_encoder", folder / "tokenizer"
        weights = next(filter(None, (_parts(model / name) for name in _ENCODER_WEIGHTS)), [])
        files = [path for path in sorted(tokenizer.glob("*")) if path.is_file()]
        if weights and files and (model / "config.json").is_file():
            names = {path.name for path in (*weights, model / "config.json")}
            return [model / "config.json", *weights, *(file for file in files if file.name not in names)]
    return []


def _parts(weights: Path) -> list[Path]:
    """A file of weights, or its index and the parts that it names; none if there is neither."""
    if weights.is_file():
        return [weights]
    index = weights.with_name(f"{weights.name}.index.json")
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{index}: cannot be read as an index of weights ({first_line(error)})") from error
    parts = [index, *(weights.with_name(str(name)) for name in names)]
    if missing := next((part for part in parts if not part.is_file()), None):
        raise ConfigError(
            f"{missing}: is missing, but {index.name} names it; download it again, or say with --encoder-model which "
            "text encoder to take"
        )
    return parts
