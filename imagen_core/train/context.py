"""What a training works with."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from imagen_core.diffusion import Denoiser
from imagen_core.store import Store
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.online import Encode
from imagen_core.train.parallel.world import World


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """What a training works with from its start to its end.

    Attributes:
        stores: by name, as `TrainConfig.by_store` names them.
        loss: a `TrainingLoss` of the denoiser, as DDP or FSDP wrap it.
        encode: encodes the captions of each batch; None reads their embeddings from the store.
        null_text: the encoding of "" that takes the place of a dropped caption, (l, text_dim) or
            (l, layers, text_dim); None where the network itself knows what a dropped caption is.
    """

    config: TrainConfig
    stores: Mapping[str, Store]
    world: World
    denoiser: Denoiser
    loss: nn.Module
    encode: Encode | None = None
    null_text: Tensor | None = None
