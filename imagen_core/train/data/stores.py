"""All stores of a training: opened, compared with each other, and taken up again where a checkpoint left them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from imagen_core.store import Mixture, Store
from imagen_core.store.read.mixture_loader import as_mixture_state, is_mixture_state
from imagen_core.train.components import store_name
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.store import MAX_OPEN_SHARDS, open_store, training_samples
from imagen_core.train.data.stream import loader_options, random_views
from imagen_core.train.errors import TrainError

_FEWEST_OPEN_SHARDS = 4


def open_stores(config: TrainConfig, *, online: bool = False) -> dict[str, Store]:
    """The stores by name, with everything the configuration reads.

    Args:
        online: captions are encoded in the training loop, so `text` need not be in the stores.
    Raises:
        TrainError: a store lacks a size or an encoder, or the stores were made in ways that cannot be mixed.
        StoreError: one cannot be read.
        StoreLostError: its files cannot be reached.
    """
    each = config.by_store()
    most = max(_FEWEST_OPEN_SHARDS, MAX_OPEN_SHARDS // len(each))
    stores = {name: open_store(one, online=online, max_open_shards=most) for name, one in each.items()}
    if config.store is None:
        options = replace(loader_options(config, 1, online=online), crop=random_views(config))
        try:
            Mixture(stores, config.weights).check(options)
        except ValueError as error:
            raise TrainError(f"stores: {error}") from error
    return stores


def num_training_samples(stores: Mapping[str, Store], config: TrainConfig) -> dict[str, int]:
    """How many samples of each store are trained on, by its name."""
    each = config.by_store()
    return {name: len(training_samples(store, each[name])) for name, store in stores.items()}


def resumed_state(
    state: dict[str, Any] | None, saved: Mapping[str, Any], config: TrainConfig
) -> dict[str, Any] | None:
    """A checkpoint's place in the data for the stores of now: the one store it was of may have become one of several.

    Args:
        saved: the configuration in the checkpoint.
    Raises:
        TrainError: it is of a mixture, and this training is not; or it is of a store that the mixture lacks.
    """
    if state is None or is_mixture_state(state) == (config.store is None):
        return state
    if config.store is not None:
        raise TrainError(
            f"store: the checkpoint is of the stores {', '.join(state['stores'])}; to go on with one of them give it "
            "as stores=[{path: ..., name: ...}] with its name, or start again in another --out"
        )
    before = str(saved.get("store"))
    same = [share.called for share in config.stores if share.path.rstrip("/") == before.rstrip("/")]
    name = same[0] if same else store_name(before)
    if name not in config.weights:
        raise TrainError(
            f"stores: the checkpoint is of the store {before}, which is not among them; add it, with weight 0 if it "
            "is not to be read any more, or start again in another --out"
        )
    return as_mixture_state(name, state)
