"""A text encoder for training to call, instead of reading the embeddings of captions from the store."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imagen_core.store import PROBE
from imagen_core.train import OnlineEncoder
from stages.encoders.encoder import load_encoder
from stages.encoders.probe import take_probe
from stages.encoders.registry import AnyEncoder


def online_encoder(config: AnyEncoder) -> OnlineEncoder:
    """Finds the model; it is loaded when training starts.

    Raises:
        MachineError: the model cannot be found, or is of another kind.
    """
    identity = config.identify()
    record: dict[str, Any] = {
        "name": config.name,
        "dim": identity.dim,
        "dtype": "float32",
        "fingerprint": identity.fingerprint,
    }

    def load():
        import torch

        encoder = load_encoder(config.pinned(identity), config.cpu_threads or torch.get_num_threads())

        record[PROBE] = take_probe(encoder)  # so that a resumed training, and prompts, are compared with it
        (empty,) = encoder.encode([""]).embeddings

        def encode(captions: Sequence[str]) -> Sequence[np.ndarray]:
            found = encoder.encode(captions).embeddings
            return [embedding if len(embedding) else empty for embedding in found]  # no token is no caption

        return encode

    return OnlineEncoder(record, load)
