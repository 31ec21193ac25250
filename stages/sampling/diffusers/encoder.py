"""The text encoder of an exported cascade: copied into its folder, named, or left to the user."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.encoders.given import KIND as GIVEN
from stages.encoders.prompts import encoder_of, load_matching_encoder
from stages.encoders.t5 import T5EncoderConfig
from stages.encoders.tiny import TINY_MODEL

_ROUNDED = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class ExportedEncoder:
    """How the exported pipeline encodes prompts.

    Attributes:
        settings: of `files/pipeline.py`.
        components: library and class of the parts that lie in the folder.
        remark: one sentence for README.md.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    components: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    remark: str = "The cascade reads no captions."


def export_encoder(record: Mapping[str, Any] | None, model: str | None, folder: Path) -> ExportedEncoder:
    """Writes `text_encoder` and `tokenizer` into a folder, if the encoder is one that the pipeline can run.

    A model on the hub is named, not copied; one in a local folder must be given.

    Args:
        record: describes the encoder that the cascade was trained on; None if it reads no captions.
        model: where it is, as the user gave it: a folder, which is copied, or a hub id.
    Raises:
        ConfigError: `model` is another encoder.
        MachineError: it cannot be found.
    """
    if record is None:
        return ExportedEncoder()
    fingerprint = record["fingerprint"]
    name = f"{fingerprint['model']} (`{record['name']}` in training, {record['dim']} wide)"
    if fingerprint["kind"] == GIVEN:
        return ExportedEncoder(remark=f"The embeddings of training came with the data, from {name}: {_GIVE}")
    config = encoder_of(record, model, use_gpu=False)
    if not isinstance(config, T5EncoderConfig) or config.reads_lines or record.get("layers"):
        return ExportedEncoder(
            remark=f"Captions were encoded by {name} in a way that this folder's code lacks: {_GIVE}"
        )
    settings = {
        "max_tokens": config.max_tokens,
        "embedding_dtype": record["dtype"] if record["dtype"] in _ROUNDED else None,
    }
    is_folder = config.model == TINY_MODEL or (model is not None and Path(model).is_dir())
    if model is not None or is_folder:
        load_matching_encoder(record, model, use_gpu=False, option="--encoder-model")
    if is_folder:
        return ExportedEncoder(settings, _copy(config, folder), f"Text encoder: {name}, in this folder.")
    revision = fingerprint["revision"] if model is None else None
    if model is None and revision is None:
        remark = f"Captions were encoded by {name}, a local model that was not given at the export: {_GIVE}"
        return ExportedEncoder(settings, remark=remark)
    hub = {"encoder_model": config.model, "encoder_revision": revision}
    return ExportedEncoder(
        settings | hub, remark=f"Text encoder: {name}, which is loaded from the hub when it is needed."
    )


_GIVE = "give `prompt_embeds`, as the store of the training has them, in place of prompts."


def _copy(config: T5EncoderConfig, folder: Path) -> dict[str, tuple[str, str]]:
    import torch
    from transformers import AutoModelForTextEncoding, PreTrainedTokenizerFast

    from stages.encoders.batches.tokens import load_tokenizer
    from stages.encoders.loading import load_weights

    with config.located() as files:
        dtype, cpu = getattr(torch, config.compute_dtype), torch.device("cpu")
        weights: Any = load_weights(AutoModelForTextEncoding, files, dtype, cpu)
        weights.save_pretrained(folder / "text_encoder")
        tokenizer = load_tokenizer(files)
        tokenizer.save_pretrained(folder / "tokenizer")
    # the name of the common class: transformers 4 has no other for a tokenizer that is only a tokenizer.json
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer_class = "PreTrainedTokenizerFast" if fast else type(tokenizer).__name__
    return {
        "text_encoder": ("transformers", type(weights).__name__),
        "tokenizer": ("transformers", tokenizer_class),
    }
