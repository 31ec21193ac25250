"""What made the embeddings a model is trained on, as checkpoints record it."""

from typing import Any

from imagen_core.store import PROBE, Store, TextGroup
from imagen_core.store.records import EmbeddingGroup
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.online import OnlineEncoder


def encoder_record(store: Store, group: EmbeddingGroup) -> dict[str, Any]:
    """The encoder of a group of the store, with its probe if the store has one."""
    record = {"name": group.encoder, "dim": group.dim, "dtype": group.dtype, "fingerprint": dict(group.fingerprint)}
    probe = store.probe(group.encoder) if isinstance(group, TextGroup) else None
    return record if probe is None else {**record, PROBE: probe}


def encoder_records(store: Store, config: TrainConfig, online: OnlineEncoder | None) -> dict[str, Any]:
    """`encoder` of captions' tokens, None if the model reads none; `embed_encoders` of vectors, by setting."""
    embeds = {}
    if config.text_embed is not None:
        embeds["text_embed"] = encoder_record(store, store.manifest.texts[config.text_embed])
    if config.image_embed is not None:
        embeds["image_embed"] = encoder_record(store, store.manifest.image_embeds[config.image_embed])
    if online is not None:
        tokens = dict(online.record)
    else:
        tokens = None if config.text is None else encoder_record(store, store.manifest.texts[config.text])
    return {"encoder": tokens, "embed_encoders": embeds}
