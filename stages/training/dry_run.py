"""What a training run needs: shown by `--dry-run`, before anything is started."""

from collections.abc import Mapping, Sequence

from imagen_core.diffusion import DenoiserConfig
from imagen_core.store import StoreError
from imagen_core.store.buckets import Shape
from imagen_core.train import TrainConfig, TrainError
from imagen_core.train.data.store import stored_sizes, trained_shapes
from imagen_core.train.data.stores import num_training_samples, open_stores
from imagen_core.train.memory import estimate_memory
from imagen_core.train.optimizer import learning_rate
from pipeline.storage.open import open_storage

_ACTIVATION_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def dry_run_summary(config: TrainConfig, *, online: bool = False) -> Mapping[str, object]:
    """Parameters, memory of one process, and the data the run reads; `online`: it needs no embeddings of captions."""
    denoiser = config.denoiser
    micro_batch = config.micro_batch_size or config.batch_size
    shapes, state = _store_state(config, online=online)
    memory = estimate_memory(
        denoiser,
        micro_batch_size=micro_batch,
        shape=max(shapes, key=lambda shape: shape[0] * shape[1], default=None),
        num_tokens=config.max_tokens,
        bytes_per_activation=_ACTIVATION_BYTES[config.precision],
        num_averages=len(config.ema.rates),
        num_shards=1,
    )
    dim, num_layers = denoiser.network.text_dim, denoiser.network.num_text_layers
    sizes = stored_sizes(config)
    needed = [f"images-{size}" for size in sizes]
    needed += [f"text-{encoder}" for encoder in (None if online else config.text, config.text_embed) if encoder]
    needed += [f"image-embed-{config.image_embed}"] if config.image_embed else []
    image_bytes = sum(3 * size * size for size in sizes)
    return {
        "parameters": memory.weights // 4,
        "weights_bytes": memory.weights,
        "gradients_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "averages_bytes": memory.averages,
        "activations_bytes": memory.activations,
        "memory_bytes": memory.total,
        "memory_is_for": f"one process, micro-batch {micro_batch}, {config.precision}, nothing sharded",
        "steps": config.num_steps,
        "batch_size": config.batch_size,
        "highest_learning_rate": max(
            learning_rate(config.optimizer, step, config.num_steps)
            for step in {0, min(config.optimizer.warmup_steps, config.num_steps - 1)}
        ),
        "samples_seen": config.num_steps * config.batch_size,
        "store_groups_needed": needed,
        "text_dim_needed": dim,
        **({} if num_layers is None else {"text_layers_needed": num_layers}),
        "image_bytes_per_sample": image_bytes,
        "text_bytes_per_token_float16": None if dim is None or online else 2 * dim * (num_layers or 1),
        **_named(config, state),
    }


def _named(config: TrainConfig, now: str | dict[str, str]) -> dict[str, object]:
    """Where the data is, and its state; of a mixture by the stores' names."""
    if config.store is not None:
        return {"store": config.store, "store_now": now if isinstance(now, str) else next(iter(now.values()))}
    places = {name: one.store for name, one in config.by_store().items()}
    return {"stores": places, "shares": config.shares, "stores_now": now}


def _store_state(config: TrainConfig, *, online: bool) -> tuple[Sequence[Shape], str | dict[str, str]]:
    """The shapes of the images trained on, and whether the stores are there and have what the run reads."""
    square = [(config.side_px, config.side_px)] if isinstance(config.denoiser, DenoiserConfig) else []
    each = config.by_store()
    try:
        stores = open_stores(config, online=online)
        counts = num_training_samples(stores, config)
        shapes = trained_shapes(next(iter(stores.values())), config)
    except (StoreError, TrainError) as error:
        missing = [name for name, one in each.items() if open_storage(str(one.store)).size("manifest.json") is None]
        if missing:
            return square, "not there yet" if config.store is not None else f"not there yet: {', '.join(missing)}"
        return square, f"cannot be used: {error}"
    buckets = f", {len(shapes)} aspect-ratio buckets" if len(shapes) > 1 else ""
    seen = config.num_steps * config.batch_size
    return shapes, {
        name: f"{count:,} samples{buckets}: {seen * config.shares[name] / count:,.1f} epochs"
        for name, count in counts.items()
    }
