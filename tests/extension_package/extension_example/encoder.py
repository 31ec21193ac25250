"""A text encoder without context: the rows of a model's embedding table, scaled."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from stages.encoders.base import EncoderConfig, TokenModel
from stages.encoders.model_files import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

_TABLE = "shared.weight"


class WordVectorsConfig(EncoderConfig):
    """The token embeddings of a T5, each multiplied by `scale`."""

    kind: Literal["word_vectors"] = "word_vectors"
    output: Literal["embeddings"] = "embeddings"
    scale: float = 1.0
    """Factor of the embeddings. As it is no machine field, it is part of the fingerprint."""

    def dim(self, files: ModelFiles) -> int:
        return int(str(files.config["d_model"]))

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> TokenModel:
        from safetensors.torch import load_file

        table = load_file(files.folder / "model.safetensors")[_TABLE]
        return WordVectors(table.to(device, dtype) * self.scale)

    def flops(self, files: ModelFiles, lengths: Sequence[int]) -> float:
        return 0.0


class WordVectors:
    """The loaded table, float (vocabulary, dim)."""

    padded = pooled = False

    def __init__(self, table: "Tensor"):
        self.table = table

    def __call__(self, ids: "Tensor", lengths: Sequence[int]) -> "Tensor":
        return self.table[ids]
