"""Embeddings of the prompts: from the store whose captions they are, or from the text encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_core.store import Store, StoreError, record_probe_differences, restore
from imagen_core.text_batch import EncoderRecords, each_encoder
from pipeline.errors import ConfigError
from stages.encoders.identity import identity_changes
from stages.encoders.prompts import encode_prompts
from stages.sampling.requests import ImageRequest

EncoderModel = str | Mapping[str, str] | None
"""Where a text encoder is (hub id or folder); by name where there are several."""


class PromptEmbeddings:
    """Embeddings of prompts as the cascade was trained on; each prompt is encoded once."""

    def __init__(
        self,
        encoder: Mapping[str, Any] | None,
        store: Store | None,
        *,
        model: str | None,
        use_gpu: bool,
        option: str = "encoder_model",
    ):
        """
        Args:
            encoder: describes the text encoder the model was trained with; None if the model reads no captions.
            store: holds the captions, if the prompts are a store's; None means that prompts are encoded.
            model: where the encoder is, if not where it was in training.
            option: the key of `model`, for messages.
        """
        self._encoder, self._model, self._use_gpu, self._option = encoder, model, use_gpu, option
        self._stored = None if encoder is None or store is None else _stored_group(store, encoder)
        self._encoded: dict[str, np.ndarray] = {}

    @property
    def origin(self) -> str | None:
        """Where the embeddings come from; None if the model reads no captions."""
        if self._encoder is None:
            return None
        return "encoder" if self._stored is None else f"store, text-{self._stored[1]}"

    def encode(self, requests: Sequence[ImageRequest], negative: str | None = None) -> None:
        """Encodes the prompts that `of` and `of_negative` will need; the encoder is loaded for it, and not kept.

        Raises:
            ConfigError: the encoder found is not the one of the cascade.
            MachineError: it cannot be found.
        """
        if self._encoder is None:
            return
        wanted = {request.prompt for request in requests} if self._stored is None else set[str]()
        if negative is not None and requests and self._stored_null(negative) is None:
            wanted.add(negative)
        prompts = sorted(wanted - self._encoded.keys())
        if prompts:
            embeddings = encode_prompts(
                prompts, self._encoder, model=self._model, use_gpu=self._use_gpu, option=self._option
            )
            self._encoded.update(zip(prompts, embeddings, strict=True))

    def of_negative(self, prompt: str | None) -> np.ndarray | None:
        """(num_tokens, dim) or (num_tokens, layers, dim) of a negative prompt; None for none."""
        if prompt is None:
            return None
        stored = self._stored_null(prompt)
        return self._encoded[prompt] if stored is None else stored

    def _stored_null(self, prompt: str) -> np.ndarray | None:
        """The empty prompt's embedding, if the store has it.

        Raises:
            ConfigError: its file is damaged.
        """
        if prompt or self._stored is None or self._encoder is None:
            return None
        store, name = self._stored
        if store.text_group(name).null is None:
            return None
        try:
            return store.null(name, self._encoder.get("layers"))
        except StoreError as error:
            raise ConfigError(f"captions.path: {error}") from error

    def of(self, requests: Sequence[ImageRequest]) -> list[np.ndarray] | None:
        """One (num_tokens, dim) or (num_tokens, layers, dim) array per image; None if the model reads no captions."""
        if self._encoder is None:
            return None
        if self._stored is None:
            return [self._encoded[request.prompt] for request in requests]
        store, name = self._stored
        try:
            layers = self._encoder.get("layers")
            return [_read(store, name, request, layers) for request in requests]
        except StoreError as error:
            raise ConfigError(f"captions.path: {error}") from error


class PromptTokens:
    """Embeddings of prompts by every text encoder whose tokens a model reads."""

    def __init__(
        self,
        encoders: EncoderRecords,
        store: Store | None,
        *,
        model: EncoderModel,
        use_gpu: bool,
        option: str = "encoder_model",
    ):
        """The arguments are those of `PromptEmbeddings`; `encoders`, and then `model`, may be of several.

        Raises:
            ConfigError: `model` is one for several encoders.
        """
        records = each_encoder(encoders)
        self._several = not isinstance(encoders, Mapping | None)
        models = _models([record["name"] for record in records], model, option)
        self._each = {
            name: PromptEmbeddings(
                record,
                store,
                model=models.get(name),
                use_gpu=use_gpu,
                option=f"{option}.{name}" if self._several else option,
            )
            for name, record in ((record["name"], record) for record in records)
        }

    @property
    def names(self) -> list[str]:
        """The encoders' names."""
        return [*self._each]

    @property
    def origin(self) -> str | dict[str, str | None] | None:
        """Where the embeddings come from, by encoder where there are several; None if the model reads no captions."""
        origins = {name: each.origin for name, each in self._each.items()}
        return origins if self._several else next(iter(origins.values()), None)

    def encode(self, requests: Sequence[ImageRequest], negative: str | None = None) -> None:
        """Encodes the prompts that `of` and `of_negative` will need, by one encoder after another; see
        `PromptEmbeddings.encode`."""
        for each in self._each.values():
            each.encode(requests, negative)

    def of_negative(self, prompt: str | None) -> np.ndarray | None:
        """A negative prompt by the one encoder that such models read; None for none."""
        if prompt is None:
            return None
        (only,) = self._each.values()
        return only.of_negative(prompt)

    def of(self, requests: Sequence[ImageRequest]) -> Sequence[np.ndarray] | Mapping[str, Sequence[np.ndarray]] | None:
        """One array per image, as `PromptEmbeddings.of`; by encoder where there are several."""
        found = {name: each.of(requests) or [] for name, each in self._each.items()}
        return found if self._several else next(iter(found.values()), None)


def _models(encoders: Sequence[str], model: EncoderModel, option: str) -> Mapping[str, str]:
    """Where each encoder is, of those that are not where they were in training."""
    if model is None:
        return {}
    if isinstance(model, str):
        if len(encoders) > 1:
            example = ", ".join(f"{name}: ..." for name in encoders)
            raise ConfigError(
                f"{option} is {model!r}, but the model reads several encoders; give them by name: "
                f"{option}={{{example}}}"
            )
        return dict.fromkeys(encoders, model)
    return model


def check_names(model: EncoderModel, encoders: Sequence[str], option: str) -> None:
    """Raises ConfigError if `model` names an encoder that is none of these."""
    unknown = [name for name in model if name not in encoders] if isinstance(model, Mapping) else []
    if unknown:
        raise ConfigError(
            f"{option}: names the encoder {unknown[0]!r}, but the models read {', '.join(encoders) or 'none'}; name "
            "one of these"
        )


def model_of(model: EncoderModel, encoder: str) -> str | None:
    """Where one encoder is, if not where it was in training."""
    return model.get(encoder) if isinstance(model, Mapping) else model


def _stored_group(store: Store, encoder: Mapping[str, Any]) -> tuple[Store, str] | None:
    """The store's embeddings by the same encoder, of the same dtype; None if there are none."""
    for name, group in store.manifest.texts.items():
        if group.dtype != encoder["dtype"] or identity_changes(encoder["fingerprint"], group.fingerprint):
            continue
        if group.dim != encoder["dim"] or not set(encoder.get("layers", ())) <= set(group.layers):
            continue
        if not record_probe_differences(encoder, store.encoder_record(group)):
            return store, name
    return None


def _read(store: Store, name: str, request: ImageRequest, layers: Sequence[int] | None) -> np.ndarray:
    caption = request.caption
    assert caption.sample is not None
    shard, row = store.locate(caption.sample)
    files = store.shard(shard)
    file = files.text[name]
    stored = file.stored(files.samples.caption_ids(row)[caption.number], layers)
    return restore(stored, store.text_group(name).dtype)
