"""The T5 family: T5, v1.1 (XXL ...), mT5, umT5, ByT5.

Imagen (Saharia et al. 2022, arXiv 2205.11487, section 2.1) conditions on the last hidden states of a
frozen T5-XXL encoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from stages.encoders.base import TokenModel, refuse_kind
from stages.encoders.loading import load_weights
from stages.encoders.model_files import ModelFiles
from stages.encoders.recipes.config import RecipeConfig

_MODEL_TYPES = ("t5", "mt5", "umt5")  # ByT5 is a T5 with a tokenizer of bytes


class T5EncoderConfig(RecipeConfig):
    """An encoder of the T5 family: T5, v1.1, mT5, umT5 or ByT5."""

    kind: Literal["t5"] = "t5"
    output: Literal["last_hidden_state"] = "last_hidden_state"
    """The states after the final norm."""

    def dim(self, files: ModelFiles) -> int:
        dim = files.config.get("d_model")
        if files.config.get("model_type") not in _MODEL_TYPES or not isinstance(dim, int):
            raise refuse_kind(self.model, files, "T5", "give a T5, mT5, umT5 or ByT5, or kind: auto")
        return self.width(dim, self.num_layers(files))

    def num_layers(self, files: ModelFiles) -> int:
        return int(str(files.config["num_layers"]))

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> TokenModel:
        from transformers import AutoModelForTextEncoding

        model = load_weights(AutoModelForTextEncoding, files, dtype, device)
        if self.needs_states:
            from stages.encoders.padded import PaddedModel

            return PaddedModel(model, self.output, self.states(model, self.num_layers(files)))
        from stages.encoders.packed.t5 import PackedT5

        return PackedT5(model)

    def flops(self, files: ModelFiles, lengths: Sequence[int]) -> float:
        shape = cast(Mapping[str, Any], files.config)
        inner = shape["num_heads"] * shape["d_kv"]
        feed_forward = 3 if str(shape.get("feed_forward_proj", "relu")).startswith("gated") else 2
        weights = shape["d_model"] * (4 * inner + feed_forward * shape["d_ff"])
        layers = self.layers_run(shape["num_layers"])
        return 2.0 * layers * sum(weights * length + 2 * length**2 * inner for length in lengths)
