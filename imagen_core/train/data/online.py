"""Captions encoded in the training loop, as other systems do it (NeMo Imagen's online encoding), to compare with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imagen_core.diffusion import PriorConfig
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import TrainError

Encode = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Captions -> float32 (num_tokens, dim) each, or (num_tokens, layers, dim), in their order."""


@dataclass(frozen=True, slots=True)
class OnlineEncoder:
    """An encoder that takes the place of a text group of the store.

    Attributes:
        record: name, dim, dtype ("float32", as nothing is stored) and fingerprint, as of a text group, and its
            layers; `load` may add its probe.
        load: loads the model on this process's device.
    """

    record: Mapping[str, Any]
    load: Callable[[], Encode]

    def check(self, config: TrainConfig) -> None:
        """Raises TrainError if the model does not read the captions of this encoder."""
        name, dim, network = self.record["name"], self.record["dim"], config.denoiser.network
        if isinstance(config.text, tuple):
            raise TrainError(
                f"online_encoder: encodes the captions for one encoder, but text is {list(config.text)}; read several "
                "from the store, and leave online_encoder out"
            )
        if name != config.text:
            raise TrainError(
                f"text is {config.text!r}, but the online encoder is named {name!r}; give both the same name"
            )
        option = f"denoiser.{'network' if isinstance(config.denoiser, PriorConfig) else 'unet'}.text_dim"
        if dim != network.text_dim:
            raise TrainError(
                f"{option} is {network.text_dim}, but the embeddings of the online encoder are {dim} wide; "
                f"set {option}={dim}"
            )
        layers, wanted = self.record.get("layers"), network.num_text_layers
        if wanted != (None if layers is None else len(layers)):
            name = f"{option.removesuffix('text_dim')}num_text_layers"
            raise TrainError(f"{name} is {wanted}, but the online encoder has the layers {layers}")


def with_text(raw: Mapping[str, Any], encode: Encode | None, config: TrainConfig) -> Mapping[str, Any]:
    """A batch of the store's loader with the `text` and `text_mask` of its `captions`; unchanged without `encode`."""
    if encode is None:
        return raw
    captions: list[str] = raw["captions"]
    embeddings = [embedding[: config.max_tokens] for embedding in (encode(captions) if captions else ())]
    lengths = [len(embedding) for embedding in embeddings]
    (shape,) = config.denoiser.network.text_shapes or ((0,),)
    text = torch.zeros(len(captions), max(lengths, default=0), *shape)
    for row, embedding in zip(text, embeddings, strict=True):  # (l, dim) or (l, layers, dim)
        row[: len(embedding)] = torch.from_numpy(embedding)
    mask = torch.arange(text.shape[1]) < torch.tensor(lengths, dtype=torch.long)[:, None]
    return {**raw, "text": text, "text_mask": mask}
