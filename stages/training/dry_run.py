"""What a training run needs: shown by `--dry-run`, before anything is started."""

import math
from collections.abc import Mapping, Sequence

from imagen_core.diffusion import DenoiserConfig
from imagen_core.store import Store, StoreError, array_group, captions_group, text_group
from imagen_core.store.buckets import Shape
from imagen_core.store.read.caption_choice import caption_shares
from imagen_core.store.read.features import FeatureReader
from imagen_core.train import TrainConfig, TrainError
from imagen_core.train.alignment.projection import hidden_width, num_projector_parameters
from imagen_core.train.data.store import stored_sizes, trained_shapes
from imagen_core.train.data.stores import num_training_samples, open_stores
from imagen_core.train.memory import estimate_memory
from imagen_core.train.optimizer import learning_rate
from pipeline.errors import ConfigError
from pipeline.storage.open import open_storage

_ACTIVATION_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def dry_run_summary(config: TrainConfig, *, online: bool = False) -> Mapping[str, object]:
    """Parameters, memory of one process, and the data the run reads; `online`: it needs no embeddings of captions.

    Raises:
        ConfigError: an adapter or an alignment does not fit the model.
    """
    denoiser = config.denoiser
    micro_batch = config.micro_batch_size or config.batch_size
    shapes, sets, state = _store_state(config, online=online)
    try:
        memory = estimate_memory(
            denoiser,
            micro_batch_size=micro_batch,
            shape=max(shapes, key=lambda shape: shape[0] * shape[1], default=None),
            num_tokens=config.max_tokens,
            bytes_per_activation=_ACTIVATION_BYTES[config.precision],
            num_averages=len(config.ema.rates) + len(config.ema.profiles),
            num_shards=1,
            lora=config.lora,
            optimizer=config.optimizer,
        )
        projector = _projector_parameters(config, online=online)
    except TrainError as error:
        raise ConfigError(str(error)) from error
    trained = memory.gradients // 4
    dim, num_layers = denoiser.network.text_dim, denoiser.network.num_text_layers
    token_bytes = [2 * math.prod(shape) for shape in denoiser.network.text_shapes]
    per_token = dict(zip(config.texts, token_bytes, strict=True)) if isinstance(config.text, tuple) else None
    image_bytes = sum(3 * size * size for size in stored_sizes(config))
    return {
        "parameters": memory.weights // 4 - (trained if config.lora is not None else 0),
        **({} if config.lora is None else {"adapter_parameters": trained}),
        "weights_bytes": memory.weights,
        "gradients_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        **_averages(config, memory.averages, trained),
        "activations_bytes": memory.activations,
        **({} if projector is None else {"projector_parameters": projector, "projector_bytes": 16 * projector}),
        "memory_bytes": memory.total + 16 * (projector or 0),
        "memory_is_for": f"one process, micro-batch {micro_batch}, {config.precision}, nothing sharded",
        "steps": config.num_steps,
        "batch_size": config.batch_size,
        "highest_learning_rate": max(
            learning_rate(config.optimizer, step, config.num_steps)
            for step in {0, min(config.optimizer.warmup_steps, config.num_steps - 1)}
        ),
        "samples_seen": config.num_steps * config.batch_size,
        "store_groups_needed": _needed_groups(config, sets, online=online),
        "text_dim_needed": dim,
        **({} if num_layers is None else {"text_layers_needed": num_layers}),
        "image_bytes_per_sample": image_bytes,
        "text_bytes_per_token_float16": None if dim is None or online else per_token or token_bytes[0],
        **_named(config, state),
    }


def _needed_groups(config: TrainConfig, sets: Sequence[str], *, online: bool) -> list[str]:
    """Groups of the store that are read; `sets`: the further sets of captions."""
    needed = [f"images-{size}" for size in stored_sizes(config)]
    encoders = [*([] if online else config.texts), *([config.text_embed] if config.text_embed else [])]
    needed += [text_group(encoder) for encoder in encoders]
    for name in sets:
        needed += [captions_group(name), *(text_group(encoder, name) for encoder in encoders)]
    needed += [f"image-embed-{config.image_embed}"] if config.image_embed else []
    needed += [array_group(name) for name in config.condition_images]
    needed += [array_group(config.alignment.encoder)] if config.alignment else []
    return needed


def _projector_parameters(config: TrainConfig, *, online: bool) -> int | None:
    """Parameters of an alignment, which take 16 bytes each with gradients and AdamW's moments; None without one, and
    without a store, which says how wide the features are.

    Raises:
        TrainError: the network has no such block.
    """
    if config.alignment is None or not isinstance(config.denoiser, DenoiserConfig):
        return None
    hidden_width(config.denoiser, config.alignment.block)
    try:
        store = next(iter(open_stores(config, online=online).values()))
        dim = FeatureReader(store, config.alignment.encoder).dim
    except (StoreError, TrainError):
        return None
    return num_projector_parameters(config.denoiser, config.alignment, dim)


def _averages(config: TrainConfig, memory_bytes: int, trained: int) -> dict[str, object]:
    """Memory of the averages; where there are snapshots of those by profile, their number and bytes on disk."""
    every = config.ema.snapshot_every_steps
    if every is None:
        return {"averages_bytes": memory_bytes}
    number = -(-config.num_steps // every)  # the last step has one too
    disk_bytes = number * len(config.ema.profiles) * 2 * trained
    return {"averages_bytes": memory_bytes, "snapshots": number, "snapshots_disk_bytes": disk_bytes}


def _named(config: TrainConfig, now: str | dict[str, str]) -> dict[str, object]:
    """Where the data is, and its state; of a mixture by the stores' names."""
    if config.store is not None:
        return {"store": config.store, "store_now": now if isinstance(now, str) else next(iter(now.values()))}
    places = {name: one.store for name, one in config.by_store().items()}
    return {"stores": places, "shares": config.shares, "stores_now": now}


def _store_state(config: TrainConfig, *, online: bool) -> tuple[Sequence[Shape], Sequence[str], str | dict[str, str]]:
    """The shapes of the images trained on, the further sets of captions that are read, and whether the stores are
    there and have what the run reads."""
    square = [(config.side_px, config.side_px)] if isinstance(config.denoiser, DenoiserConfig) else []
    each = config.by_store()
    try:
        stores = open_stores(config, online=online)
        counts = num_training_samples(stores, config)
        shapes = trained_shapes(next(iter(stores.values())), config)
    except (StoreError, TrainError) as error:
        missing = [name for name, one in each.items() if open_storage(str(one.store)).size("manifest.json") is None]
        if missing:
            state = "not there yet" if config.store is not None else f"not there yet: {', '.join(missing)}"
            return square, [], state
        return square, [], f"cannot be used: {error}"
    buckets = f", {len(shapes)} aspect-ratio buckets" if len(shapes) > 1 else ""
    seen = config.num_steps * config.batch_size
    shares = {name: _caption_shares(store, each[name]) for name, store in stores.items()}
    sets = sorted(
        {name for store, of in shares.items() for name in of if name != next(iter(stores[store].caption_sets))}
    )
    told = {
        name: ", captions " + ", ".join(f"{called} {share:.4g}" for called, share in of.items()) if sets and of else ""
        for name, of in shares.items()
    }
    return (
        shapes,
        sets,
        {
            name: f"{count:,} samples{buckets}{told[name]}: {seen * config.shares[name] / count:,.1f} epochs"
            for name, count in counts.items()
        },
    )


def _caption_shares(store: Store, config: TrainConfig) -> dict[str, float]:
    """The part of the captions that comes from each set; none if no captions are read."""
    return caption_shares(store, config.captions) if config.reads_captions else {}
