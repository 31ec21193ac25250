"""Finds a model's files, on the hub or in a local folder, and identifies them by content."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, MachineError, first_line
from pipeline.fingerprint import digest
from pipeline.storage.files import file_digest
from stages.digests import remembered_digest

_TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.json|.*\.model|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json"
)
_SAFETENSORS = re.compile(r"model.*\.safetensors")
_TORCH_BIN = re.compile(r"pytorch_model.*\.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"
"""Settings of a model in open_clip's own files."""
_ADAPTER, _PIPELINE = "adapter_config.json", "model_index.json"
_SMALL_FILES = ("*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that was found: its name for transformers, and its identity."""

    model: str
    """Hub id, or local folder."""
    revision: str | None
    """Commit on the hub; None for a local folder."""
    folder: Path
    """The folder of its small files: config.json, tokenizer, preprocessor_config.json."""
    config: dict[str, object]
    """The config.json."""
    identity: dict[str, object]
    """Name, revision, and SHA-256 of the weights; without paths."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the tokenizer files; None if there are none."""


def hf_config(files: ModelFiles) -> Any:
    """The model's config.json as a configuration of transformers, with its defaults.

    Raises:
        MachineError: transformers knows no such model_type.
    """
    from transformers import AutoConfig

    settings = dict(files.config)
    try:
        return AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    except (KeyError, ValueError) as error:
        raise MachineError(
            f"encoders.model: {files.model}: transformers knows no model_type {files.config.get('model_type')!r}; "
            "give a model that it supports"
        ) from error


def find_model(model: str, revision: str | None) -> ModelFiles:
    """Locates a model without loading it.

    A hub model that is in the local cache needs no network; `HF_HUB_OFFLINE=1` is respected.

    Raises:
        ConfigError: it is a pipeline of several models.
        MachineError: it is neither a local folder nor a reachable hub model, or files are missing.
    """
    folder = Path(model)
    if folder.is_dir():
        return _local(folder, folder.absolute().name, None, model)
    if "://" in model:
        raise MachineError(
            f"encoders.model: {model} is a URL; give a hub id, or copy the folder to a path that all nodes see"
        )
    if model.startswith((".", "/", "~")):
        raise MachineError(f"encoders.model: {model} is not a folder; give a model folder or a hub id")
    return _hub(model, revision)


def _local(folder: Path, name: str, revision: str | None, model: str) -> ModelFiles:
    config_file = folder / "config.json"
    if not config_file.is_file():
        _refuse_pipeline([path.name for path in folder.iterdir()], model)
        if (folder / OPEN_CLIP_CONFIG).is_file():
            raise MachineError(
                f"encoders.model: {model} has open_clip's own files; make a model folder of them: "
                f"pipeline import open-clip {model} --out FOLDER"
            )
        raise MachineError(f"encoders.model: {model} has no config.json; give a folder saved by save_pretrained")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    weights = _weight_names(names, model)
    _refuse_adapter(names, model)
    return ModelFiles(
        model=model,
        revision=revision,
        folder=folder,
        config=_config(config_file, model),
        identity={
            "model": name,
            "revision": revision,
            "weights_sha256": digest({n: _content_digest(folder / n) for n in weights}),
        },
        tokenizer_sha256=tokenizer_digest(folder),
    )


def _config(file: Path, model: str) -> dict[str, object]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MachineError(
            f"encoders.model: {model}: config.json cannot be read as JSON ({first_line(error)}); copy or download the "
            "model again"
        ) from error
    if not isinstance(config, dict):
        raise MachineError(
            f"encoders.model: {model}: config.json must be a JSON object (got a {type(config).__name__}); copy or "
            "download the model again"
        )
    return config


def _hub(model: str, revision: str | None) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*_SMALL_FILES, "*.safetensors", "*.bin"]
    try:
        cached = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=patterns))
        _refuse_pipeline([path.name for path in cached.iterdir()], model)
        _weight_names([path.name for path in cached.iterdir()], model)
        return _local(cached, model, cached.name, model)
    except (LocalEntryNotFoundError, MachineError, OSError, ValueError):
        pass  # not in the cache, or incomplete: ask the hub
    try:
        return _online(model, revision)
    except (ConfigError, MachineError):
        raise
    except Exception as error:
        raise MachineError(
            f"encoders.model: {model!r} is neither a local folder, nor cached, nor reachable on the hub "
            f"({type(error).__name__}); download it once with `hf download {model}`, or give a local folder"
        ) from error


def _online(model: str, revision: str | None) -> ModelFiles:
    """Requests the weights' hashes from the hub, and downloads only the small files; workers load the weights."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(model, revision=revision, files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    _refuse_pipeline(files, model)
    _refuse_adapter(files, model)
    hashes: dict[str, str] = {}
    for name in _weight_names(files, model):
        lfs = files[name].lfs
        if lfs is None:
            raise MachineError(f"encoders.model: {model}: the hub gives no hash for {name}; download it first")
        hashes[name] = lfs.sha256
    small = Path(snapshot_download(model, revision=info.sha, allow_patterns=list(_SMALL_FILES)))
    return ModelFiles(
        model=model,
        revision=info.sha,
        folder=small,
        config=_config(small / "config.json", model),
        identity={
            "model": model,
            "revision": info.sha,
            "weights_sha256": digest(hashes),
        },
        tokenizer_sha256=tokenizer_digest(small),
    )


def check_headers(files: ModelFiles) -> None:
    """Finds a cut or damaged file of weights without reading them; only those that are on this machine.

    Raises:
        MachineError: names the file.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(files.folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise MachineError(
                f"encoders.model: {file} cannot be loaded: {error}; copy or download the model again"
            ) from error


def _refuse_adapter(names: Iterable[str], model: str) -> None:
    if _ADAPTER in names:
        raise MachineError(
            f"encoders.model: {model} has {_ADAPTER}: with peft installed transformers would load the adapter and the "
            "model it names, without peft the weights of the folder; merge the adapter into the weights, and remove it"
        )


def _refuse_pipeline(names: Iterable[str], model: str) -> None:
    if _PIPELINE in names:
        raise ConfigError(
            f"encoders.model: {model} has {_PIPELINE}: it is a pipeline of several models; copy the files of its "
            "folders text_encoder and tokenizer into one folder, and give that"
        )


def _weight_names(names: Iterable[str], model: str) -> list[str]:
    names = list(names)
    for pattern in (_SAFETENSORS, _TORCH_BIN):
        found = sorted(n for n in names if pattern.fullmatch(n))
        if found:
            return found
    raise MachineError(f"encoders.model: {model} has no model*.safetensors or pytorch_model*.bin")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that decide its tokenizer, by name."""
    return sorted(path for path in folder.iterdir() if _TOKENIZER_FILES.fullmatch(path.name))


def tokenizer_digest(folder: Path) -> str | None:
    """SHA-256 of the tokenizer files in a model folder; None if there are none."""
    found = tokenizer_files(folder)
    return digest({path.name: _content_digest(path) for path in found}) if found else None


def _content_digest(path: Path) -> str:
    """SHA-256 of a file; large ones are hashed once.

    The hub's cache names large files by their SHA-256, so they need no hashing.
    """
    real = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    if real.stat().st_size < 2**26:
        return file_digest(real)
    return remembered_digest([real], lambda: file_digest(real))
