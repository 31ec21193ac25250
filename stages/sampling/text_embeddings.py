"""Embeddings of the prompts: from the store they are captions of, or from the text encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imagen_core.store import Store, StoreError, restore
from pipeline.errors import ConfigError
from pipeline.fingerprint import differences
from stages.encoders.prompts import encode_prompts
from stages.sampling.caption_sets import StoreCaptions
from stages.sampling.config import SampleConfig
from stages.sampling.requests import ImageRequest


class Embeddings:
    """Embeddings of prompts as the cascade was trained on; each prompt is encoded once."""

    def __init__(
        self,
        config: SampleConfig,
        encoder: Mapping[str, Any] | None,
        *,
        model: str | None,
        use_gpu: bool,
        option: str = "encoder_model",
    ):
        """`encoder` describes the one the model was trained on, None if it reads no captions; it is found at `model`,
        if that is given; `option` is its key, for messages."""
        self._encoder, self._model, self._use_gpu, self._option = encoder, model, use_gpu, option
        self._stored = None if encoder is None else _stored_group(config, encoder)
        self._encoded: dict[str, np.ndarray] = {}

    @property
    def origin(self) -> str | None:
        """Where they are from."""
        if self._encoder is None:
            return None
        return "encoder" if self._stored is None else f"store, text-{self._stored[1]}"

    def prepare(self, images: Sequence[ImageRequest]) -> None:
        """Encodes what `of` will be asked for; the encoder is loaded for that, and not kept.

        Raises:
            ConfigError: the encoder found is not the one of the cascade.
            MachineError: it cannot be found.
        """
        if self._encoder is None or self._stored is not None:
            return
        prompts = sorted({image.prompt for image in images} - self._encoded.keys())
        if prompts:
            embeddings = encode_prompts(
                prompts, self._encoder, model=self._model, use_gpu=self._use_gpu, option=self._option
            )
            self._encoded.update(zip(prompts, embeddings, strict=True))

    def of(self, images: Sequence[ImageRequest]) -> list[np.ndarray] | None:
        """One (num_tokens, dim) array an image; None if no stage reads captions."""
        if self._encoder is None:
            return None
        if self._stored is None:
            return [self._encoded[image.prompt] for image in images]
        store, name = self._stored
        try:
            return [_read(store, name, image) for image in images]
        except StoreError as error:
            raise ConfigError(f"captions.path: {error}") from error


def _stored_group(config: SampleConfig, encoder: Mapping[str, Any]) -> tuple[Store, str] | None:
    """The store's embeddings by the very encoder, of the very type; None if there are none."""
    if not isinstance(config.captions, StoreCaptions):
        return None
    store = config.captions.store
    for name, group in store.manifest.texts.items():
        if group.dtype == encoder["dtype"] and not differences(dict(encoder["fingerprint"]), group.fingerprint):
            return store, name
    return None


def _read(store: Store, name: str, image: ImageRequest) -> np.ndarray:
    caption = image.caption
    assert caption.sample is not None
    shard, row = store.locate(caption.sample)
    files = store.shard(shard)
    file = files.text[name]
    return restore(file.stored(files.samples.caption_ids(row)[caption.number]), store.text_group(name).dtype)
