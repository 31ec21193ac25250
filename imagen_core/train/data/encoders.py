"""What made the embeddings a model is trained on, as checkpoints record it."""

from collections.abc import Mapping
from typing import Any

from imagen_core.store import Store
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.online import OnlineEncoder


def encoder_records(stores: Mapping[str, Store], config: TrainConfig, online: OnlineEncoder | None) -> dict[str, Any]:
    """`encoder` of captions' tokens, None if the model reads none, a list where it reads several encoders;
    `embed_encoders` of vectors, by setting.

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
    return {"encoder": tokens if several else next(iter(tokens), None), "embed_encoders": embeds}
