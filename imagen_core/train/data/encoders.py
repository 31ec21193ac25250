"""What made the embeddings a model is trained on, as checkpoints record it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imagen_core.diffusion import DenoiserConfig
from imagen_core.store import Store, StoreError
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.online import Encode, OnlineEncoder
from imagen_core.train.errors import TrainError


def encoder_records(stores: Mapping[str, Store], config: TrainConfig, online: OnlineEncoder | None) -> dict[str, Any]:
    """`encoder` of captions' tokens, None if the model reads none, a list where it reads several encoders;
    `embed_encoders` of vectors, by setting; `teacher` of the features that an alignment reads.

    Stores that are mixed are of the same encoders, so the first one stands for all.
    """
    store = next(iter(stores.values()))
    embeds = {}
    if config.text_embed is not None:
        embeds["text_embed"] = store.encoder_record(store.manifest.texts[config.text_embed])
    if config.image_embed is not None:
        embeds["image_embed"] = store.encoder_record(store.manifest.image_embeds[config.image_embed])
    if online is not None:
        tokens = [dict(online.record)]
    else:
        tokens = [store.encoder_record(store.text_group(name), layers) for name, layers in config.texts.items()]
    several = isinstance(config.text, tuple)
    records = {"encoder": tokens if several else next(iter(tokens), None), "embed_encoders": embeds}
    if config.alignment is not None:
        features = store.array_group(config.alignment.encoder)
        records["teacher"] = {"features": str(features.spec), "fingerprint": features.fingerprint}
    return records


def null_text(stores: Mapping[str, Store], config: TrainConfig, encode: Encode | None) -> Tensor | None:
    """The encoding of "" that takes the place of a dropped caption, float32 (l, text_dim) or (l, layers, text_dim);
    None for a model that needs none.

    Raises:
        TrainError: the store does not have it.
    """
    settings = config.denoiser
    if not isinstance(settings, DenoiserConfig) or not settings.unet.needs_empty_caption:
        return None
    if encode is not None:
        (found,) = encode([""])
    else:
        ((group, layers),) = config.texts.items()
        store = next(iter(stores.values()))
        try:
            found = store.null(group, layers)
        except StoreError as error:
            raise TrainError(
                f"denoiser.unet.dropped_caption=empty_caption: {error}; encode the captions again with this version"
            ) from error
    return torch.from_numpy(found[: config.max_tokens].astype("float32"))
