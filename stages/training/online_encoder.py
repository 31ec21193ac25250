"""A text encoder for training to call, instead of reading the embeddings of captions from the store."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imagen_core.store import PROBE
from imagen_core.train import OnlineEncoder
from stages.encoders.encoder import load_encoder
from stages.encoders.probe import take_probe
from stages.encoders.recipes.layers import as_recorded, check_layers
from stages.encoders.registry import AnyEncoder


def online_encoder(config: AnyEncoder, layers: Sequence[int] | None = None) -> OnlineEncoder:
    """Finds the model; it is loaded when training starts.

    Args:
        layers: those that are read of an encoder whose layers are kept apart; None means all.
    Raises:
        ConfigError: the encoder does not have these layers.
        MachineError: the model cannot be found, or is of another kind.
    """
    identity = config.identify()
    record: dict[str, Any] = {
        "name": config.name,
        "dim": identity.dim // len(identity.layers) if identity.stacked else identity.dim,
        "dtype": "float32",
        "fingerprint": identity.fingerprint,
    }
    if identity.stacked or layers is not None:
        record["layers"] = list(identity.layers if layers is None else layers)
        check_layers(config.name, identity, record["layers"])

    def load():
        import torch

        encoder = load_encoder(config.pinned(identity), config.cpu_threads or torch.get_num_threads())

        record[PROBE] = take_probe(encoder)  # so that a resumed training, and prompts, are compared with it
        (empty,) = encoder.encode([""]).embeddings

        def encode(captions: Sequence[str]) -> Sequence[np.ndarray]:
            found = encoder.encode(captions).embeddings
            kept = [embedding if len(embedding) else empty for embedding in found]  # no token is no caption
            return [as_recorded(embedding, record, identity.layers) for embedding in kept]

        return encode

    return OnlineEncoder(record, load)
