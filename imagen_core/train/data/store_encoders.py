"""Whether a store has the embeddings that a training reads, by the widths and layers that its model has."""

from collections.abc import Mapping

from imagen_core.models.prior import PriorNetworkConfig
from imagen_core.store import Store
from imagen_core.store.read.caption_choice import CaptionChoice
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.records import EmbeddingGroup
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import TrainError

SHARDS_TO_CHECK = 16
"""Shards at the beginning of a store by which it is told what its samples have."""


def check_encoders(store: Store, config: TrainConfig, *, online: bool) -> None:
    """Refuses a store that lacks an encoder or a set of captions, or has embeddings of another width than the model.

    Args:
        online: captions are encoded in the training loop, so `text` need not be in the store.
    Raises:
        TrainError: names the field, both values and what to set.
    """
    network = config.denoiser.network
    if isinstance(network, PriorNetworkConfig):
        image_dim, model, embed_option = network.dim, "denoiser.network", "denoiser.network.dim"
        text_embed_dim, text_embed_option = network.dim, embed_option
    else:
        image_dim, model = network.image_embed_dim, "denoiser.unet"
        embed_option = f"{model}.image_embed_dim"
        text_embed_dim, text_embed_option = network.text_embed_dim, f"{model}.text_embed_dim"
    texts = {} if online else config.texts
    for number, encoder in enumerate(texts):
        at = f".{number}" if isinstance(config.text, tuple) else ""
        dim = network.text_shapes[number][-1]
        _check_encoder(f"text{at}", encoder, store.manifest.texts, dim, f"{model}.text_dim{at}")
        _check_layers(store, config, number, encoder, f"{model}.num_text_layers", at)
    _check_caption_sets(store, config, online=online)
    _check_one_vector(store, config.text_embed)
    _check_encoder("text_embed", config.text_embed, store.manifest.texts, text_embed_dim, text_embed_option)
    _check_encoder("image_embed", config.image_embed, store.manifest.image_embeds, image_dim, embed_option)


def _check_encoder(
    field: str, encoder: str | None, groups: Mapping[str, EmbeddingGroup], dim: int | None, option: str
) -> None:
    """Refuses an encoder that the store lacks, or whose embeddings have another width than `option`."""
    if encoder is None:
        return
    if encoder not in groups:
        kind = "image encoder" if field == "image_embed" else "encoder"
        raise TrainError(f"{field}: the store has no {kind} {encoder!r} ({kind}s: {sorted(groups)})")
    if groups[encoder].dim != dim:
        raise TrainError(
            f"{option} is {dim}, but the embeddings of {encoder!r} in the store are {groups[encoder].dim} wide; set "
            f"{option}={groups[encoder].dim}"
        )


def _check_layers(store: Store, config: TrainConfig, number: int, encoder: str, option: str, at: str) -> None:
    """Refuses layers that the store lacks, or another number of them than the model reads of an encoder."""
    network, group, layers = config.denoiser.network, store.text_group(encoder), config.texts[encoder]
    wanted = network.text_layer_counts[number]
    if layers is not None:
        try:
            group.layer_places(layers)
        except ValueError as error:
            raise TrainError(f"text_layers: {error}") from error
    found = len(layers or group.layers) or None
    if wanted != found:
        has = f"has the layers {list(group.layers)} apart" if group.layers else "has no layers apart"
        remedy = f"set {option}={network.with_layer_count(number, found)}"
        if group.layers and wanted is not None:
            remedy += ", or text_layers to as many of them"
        raise TrainError(
            f"{option}{at} is {wanted or 'null'}, but the store {config.store} {has} of {group.encoder!r}; {remedy}"
        )


def _check_caption_sets(store: Store, config: TrainConfig, *, online: bool) -> None:
    """Refuses sets of captions that the store lacks, or that were not encoded."""
    if not config.reads_captions:
        return
    text = [] if online else [encoder for encoder in config.texts if encoder in store.encoders]
    text_embed = config.text_embed if config.text_embed in store.encoders else None  # or refused by name
    options = LoaderOptions(1, text=text or None, text_embed=text_embed, captions=True, caption_sets=config.captions)
    try:
        CaptionChoice(store, options)
    except ValueError as error:
        raise TrainError(f"captions: store {config.store}: {error}") from error


def _check_one_vector(store: Store, encoder: str | None) -> None:
    """Refuses an encoder of tokens as `text_embed`, by the first shards."""
    if encoder is None or encoder not in store.manifest.texts:
        return  # refused by name
    for shard in range(min(SHARDS_TO_CHECK, store.manifest.num_shards)):
        most = max(store.shard(shard).text[encoder].num_tokens, default=1)
        if most != 1:
            raise TrainError(
                f"text_embed: {encoder!r} has {most} vectors per caption; name an encoder of one, such as "
                f"kind=clip with output=projected (encoders in the store: {sorted(store.manifest.texts)})"
            )
