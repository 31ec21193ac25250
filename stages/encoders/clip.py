"""CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020): OpenAI's, and OpenCLIP's in the format of transformers.

DALL-E 2 conditions on the projected embedding and the token states, latent diffusion on the token states.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stages.encoders.base import TokenModel, refuse_kind
from stages.encoders.loading import load_weights
from stages.encoders.model_files import ModelFiles, hf_config
from stages.encoders.recipes.config import RecipeConfig


class ClipTextConfig(RecipeConfig):
    """A CLIP text encoder."""

    kind: Literal["clip"] = "clip"
    max_tokens: int = Field(default=77, ge=2)
    """Longest caption in tokens, start and end tokens included; CLIP was trained with 77."""
    output: Literal["last_hidden_state", "penultimate", "pooled", "projected"] = "last_hidden_state"
    """Token states after the final norm; token states before the last layer, without a norm; the end token's state; or
    this state projected into the space shared with images (one vector per caption, not normalised)."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.layers is not None or self.final_norm is not True:
            raise ValueError("layers and final_norm are not for kind: clip; choose its output instead")
        return self

    def dim(self, files: ModelFiles) -> int:
        if files.config.get("model_type") not in ("clip", "clip_text_model"):
            raise refuse_kind(self.model, files, "CLIP", "give a CLIP in the format of transformers, or kind: auto")
        text = _text(files)
        self.check_positions(text.max_position_embeddings)
        return text.projection_dim if self.output == "projected" else text.hidden_size

    def num_layers(self, files: ModelFiles) -> int:
        return _text(files).num_hidden_layers

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> TokenModel:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        from stages.encoders.padded import PaddedModel

        model_class = CLIPTextModelWithProjection if self.output == "projected" else CLIPTextModel
        return PaddedModel(load_weights(model_class, files, dtype, device), self.output)

    def flops(self, files: ModelFiles, lengths: Sequence[int]) -> float:
        from transformers import CLIPTextModel

        from stages.encoders.padded import count_flops

        return count_flops(CLIPTextModel, _text(files), lengths)


def _text(files: ModelFiles) -> Any:
    """The configuration of the text half."""
    config = hf_config(files)
    return getattr(config, "text_config", config)
