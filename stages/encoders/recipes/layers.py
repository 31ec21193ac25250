"""Chosen layers of an encoder whose layers are stored apart, of what the encoder returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from stages.encoders.base import EncoderIdentity


def check_layers(name: str, identity: EncoderIdentity, layers: Sequence[int]) -> None:
    """Refuses layers that an encoder does not keep apart.

    Raises:
        ConfigError: names them, and the ones there are.
    """
    if not identity.stacked or not set(layers) <= set(identity.layers):
        kept = f"keeps the layers {list(identity.layers)}" if identity.stacked else "keeps no layers apart"
        raise ConfigError(
            f"text_layers: {list(layers)}, but the encoder {name} {kept}; choose of these, or leave it out"
        )


def as_recorded(embedding: np.ndarray, record: Mapping[str, Any], layers: Sequence[int]) -> np.ndarray:
    """What an encoder returned, (n_tokens, width of all layers), as a training or a store has it: that, or
    (n_tokens, layers, dim) of the layers that the encoder's record names.

    Args:
        layers: all that the encoder returns.
    """
    if "layers" not in record:
        return embedding
    places = [layers.index(layer) for layer in record["layers"]]
    return embedding.reshape(len(embedding), len(layers), record["dim"])[:, places]
