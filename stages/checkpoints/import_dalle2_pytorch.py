"""`pipeline import dalle2-pytorch`: checkpoints of DALLE2-pytorch's trainers become checkpoints of this toolkit.

prior.pth           of DiffusionPriorTrainer.save
decoder.pth         of DecoderTrainer.save
prior.json          settings next to each, else prior_config.json and decoder_config.json in its folder: a
                    TrainDiffusionPriorConfig or TrainDecoderConfig, or its part `prior` or `decoder`
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.commands import CommandResult
from pipeline.errors import ConfigError, first_line
from stages.checkpoints.imported import (
    ImportedEncoders,
    ImportedModel,
    ImportedStage,
    clip_encoders,
    explained,
    load_tensors,
    new_folder,
    write_stages,
)

CLIPS = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
"""OpenAI's names of its CLIPs, and their names on the hub."""
_MAX_TOKENS = 77
_INERT = (
    *("packaging.version.Version", "packaging.version._Version"),
    *("packaging._structures.InfinityType", "packaging._structures.NegativeInfinityType"),
    *("pytorch_warmup.base.LinearWarmup", "torch.optim.adam.Adam", "torch.optim.adamw.AdamW"),
    "builtins.dict",
)
"""Classes that the trainers' version and warm-up schedule name; none of them is imported."""


def _empty_dict(*_: object) -> dict[str, Any]:
    """Stands in for a defaultdict; torch reads entries into a plain dict only."""
    return {}


class _Inert:
    """Stands in for an object; keeps what it was pickled with."""

    def __init__(self, *content: object):
        self.content: object = content

    def __setstate__(self, state: object) -> None:
        self.content = state


@dataclass(frozen=True, slots=True)
class _Model:
    """A file with its settings; `kind` is prior or decoder, and `version` DALLE2-pytorch's."""

    path: Path
    kind: str
    version: tuple[int, ...]
    settings: Mapping[str, Any]


def import_dalle2_pytorch(paths: Sequence[str], *, out: str, encoder_model: str | None = None) -> CommandResult:
    """Writes `OUT/prior`, and `OUT/unet-0`, `OUT/unet-1` ... of a decoder, with a checkpoint each, and
    `OUT/sample.yaml`, their way to sample.

    Args:
        paths: a file of a prior, a file of a decoder, or both, in any order.
        encoder_model: where their CLIP is (hub id or folder), if not OpenAI's from the hub that the settings name.
    Raises:
        ConfigError: a file cannot be read, or has a setting without a counterpart here.
        MachineError: CLIP cannot be found.
    """
    target = new_folder(out)
    models = [_model(Path(path)) for path in paths]
    kinds = [model.kind for model in models]
    if len(set(kinds)) != len(kinds):
        raise ConfigError(f"give one prior, one decoder, or both (got {', '.join(kinds)})")
    priors = [_prior(model) for model in models if model.kind == "prior"]
    stages = [stage for model in models if model.kind == "decoder" for stage in _decoder(model)]
    encoders = _encoders(models, [*priors, *stages], encoder_model)
    prior = priors[0] if priors else None
    return write_stages(target, stages, encoders.text, embed_encoders=encoders.embeds, prior=prior)


def _model(path: Path) -> _Model:
    checkpoint = _checkpoint(path)
    weights, version = checkpoint["model"], _version(checkpoint.get("version"))
    if not version:
        raise ConfigError(f"{path}: names no version; give a checkpoint of DALLE2-pytorch's trainers, which do")
    kinds = {"prior": "net.", "decoder": "unets."}
    found = [kind for kind, prefix in kinds.items() if any(name.startswith(prefix) for name in weights)]
    if len(found) != 1:
        raise ConfigError(f"{path}: its model is neither a prior nor a decoder of DALLE2-pytorch")
    return _Model(path, found[0], version, _settings(path, found[0]))


def _version(value: object) -> tuple[int, ...]:
    """The numbers of a version, as text or as packaging pickles it; empty if there is none."""
    if isinstance(value, str):
        return tuple(int(number) for number in re.findall(r"\d+", value)[:3])
    if isinstance(value, tuple) and len(value) > 1 and all(isinstance(number, int) for number in value):
        return value
    parts = value.content if isinstance(value, _Inert) else value
    parts = parts.values() if isinstance(parts, dict) else parts
    return next(filter(None, map(_version, parts)), ()) if isinstance(parts, Iterable) else ()


def _settings(path: Path, kind: str) -> Mapping[str, Any]:
    """The settings of the model, from the file next to it."""
    beside, common = path.with_suffix(".json"), path.with_name(f"{kind}_config.json")
    file = beside if beside.is_file() or not common.is_file() else common
    if not file.is_file():
        raise ConfigError(f"{path}: has no settings in it; put those it was trained with at {beside} or {common}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({first_line(error)})") from error
    settings = settings.get(kind, settings) if isinstance(settings, dict) else settings
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: must be settings by name; give the configuration of a {kind} (got {settings!r})")
    return settings


def _prior(model: _Model) -> ImportedModel:
    from imagen_core.conversion.dalle2_prior import prior_config

    with explained(f"{model.path}: cannot be built here"):
        config, sampling = prior_config(model.settings, model.version)
    max_tokens = min(_MAX_TOKENS, config.network.max_text_tokens)
    return ImportedModel(str(model.path), config, sampling, max_tokens, partial(_prior_network, model, config))


def _prior_network(model: _Model, config: Any) -> dict[str, Any]:
    """The tensors of the network by name: their average, if there is one that was updated."""
    from imagen_core.conversion.dalle2_prior import prior_weights

    checkpoint = _checkpoint(model.path)
    ema = checkpoint.get("ema") or {}
    averages = checkpoint.get("ema_model") or _under("ema_model.", ema)
    tensors = averages if averages and ema.get("initted", True) else checkpoint["model"]
    with explained(f"{model.path}: the weights do not fit the settings"):
        return prior_weights(_under("net.", tensors), config, model.version)


def _decoder(model: _Model) -> list[ImportedStage]:
    from imagen_core.conversion.dalle2_decoder import decoder_unets

    with explained(f"{model.path}: cannot be built here"):
        unets = decoder_unets(model.settings, model.version)
    return [
        ImportedStage(
            str(model.path),
            unet.config,
            unet.sampling,
            min(_MAX_TOKENS, model.settings["unets"][unet.index].get("max_text_len", _MAX_TOKENS)),
            partial(_unet_network, model.path, unet),
        )
        for unet in unets
    ]


def _unet_network(path: Path, unet: Any) -> dict[str, Any]:
    """The tensors of a UNet by name: their average, if there is one that was updated."""
    from imagen_core.conversion.dalle2_unet import unet_weights

    checkpoint = _checkpoint(path)
    averages, tensors, prefix = checkpoint.get("ema") or {}, checkpoint["model"], f"unets.{unet.index}."
    if averages.get(f"{unet.index}.initted"):
        tensors, prefix = averages, f"{unet.index}.ema_model."
    with explained(f"{path}: the weights of unets.{unet.index} do not fit the settings"):
        return unet_weights(_under(prefix, tensors), unet.config.unet, constrained=unet.constrained)


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}


def _encoders(
    models: Sequence[_Model], imported: Sequence[ImportedModel], encoder_model: str | None
) -> ImportedEncoders:
    """CLIP, which encoded captions and images."""
    networks: list[Any] = [model.config.network for model in imported]
    priors = [network.dim for network in networks if network.family == "prior"]
    decoders = [network.image_embed_dim for network in networks if network.family != "prior"]
    image_embed_dim = _width("embeddings of images", [*priors, *decoders])
    text_dim = _width("tokens of captions", [network.text_dim for network in networks])
    if image_embed_dim is None and text_dim is None:
        return ImportedEncoders(None, {})
    return clip_encoders(
        encoder_model or _clip(models),
        max_tokens=_MAX_TOKENS,
        text_dim=text_dim,
        text_embed_dim=priors[0] if priors else None,
        image_embed_dim=image_embed_dim,
    )


def _width(what: str, widths: Sequence[int | None]) -> int | None:
    found = sorted({width for width in widths if width is not None})
    if len(found) > 1:
        raise ConfigError(f"the models read {what} of different widths ({found}), so not of one CLIP")
    return found[0] if found else None


def _clip(models: Sequence[_Model]) -> str:
    """The name on the hub of the CLIP that the settings name."""
    clip = next((model.settings["clip"] for model in models if isinstance(model.settings.get("clip"), dict)), None)
    if clip is not None and clip.get("make", "openai") == "openai" and clip.get("model", "ViT-L/14") in CLIPS:
        return CLIPS[clip.get("model", "ViT-L/14")]
    found = "the settings have no clip" if clip is None else f"clip is {json.dumps(clip)}"
    raise ConfigError(
        f"{models[0].path}: {found}, which is none of OpenAI's ({', '.join(CLIPS)}); say with --encoder-model "
        "which model made the embeddings"
    )


def _checkpoint(path: Path) -> dict[str, Any]:
    import torch

    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a checkpoint of DALLE2-pytorch's trainers")
    stand_ins = [(_Inert, name) for name in _INERT]
    with torch.serialization.safe_globals([*stand_ins, (_empty_dict, "collections.defaultdict")]):
        checkpoint = load_tensors(path, str(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ConfigError(f"{path}: has no model in it; give a checkpoint of DALLE2-pytorch's trainers")
    return checkpoint
