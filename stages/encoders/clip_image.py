"""CLIP's image encoder (Radford et al. 2021, arXiv 2103.00020): the image embeddings that DALL-E 2 is trained on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from stages.encoders.base import ImageEncoderConfig, ImageModelConfig, Preprocessing, refuse_kind
from stages.encoders.loading import load_weights
from stages.encoders.model_files import ModelFiles, hf_config

if TYPE_CHECKING:
    from torch import Tensor


class ClipImageModelConfig(ImageModelConfig):
    """A CLIP image encoder."""

    kind: Literal["clip"] = "clip"
    output: Literal["projected", "pooled"] = "projected"
    """The embedding in the space shared with captions (not normalised), or the state it is projected from."""

    def dim(self, files: ModelFiles) -> int:
        vision = self._vision(files)
        return vision.projection_dim if self.output == "projected" else vision.hidden_size

    def preprocessing(self, files: ModelFiles) -> Preprocessing:
        return Preprocessing.read(files.folder / "preprocessor_config.json", self._vision(files).image_size)

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> "Callable[[Tensor], Tensor]":
        from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

        if self.output == "projected":
            projected = load_weights(CLIPVisionModelWithProjection, files, dtype, device)
            return lambda pixels: projected(pixel_values=pixels).image_embeds
        pooled = load_weights(CLIPVisionModel, files, dtype, device)
        return lambda pixels: pooled(pixel_values=pixels).pooler_output

    def _vision(self, files: ModelFiles) -> Any:
        """The configuration of the vision half."""
        if files.config.get("model_type") not in ("clip", "clip_vision_model"):
            raise refuse_kind(self.model, files, "CLIP", "give a CLIP in the format of transformers")
        config = hf_config(files)
        return getattr(config, "vision_config", config)


class ClipImageConfig(ClipImageModelConfig, ImageEncoderConfig):
    """A CLIP image encoder, applied to images of the store."""
