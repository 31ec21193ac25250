"""Patch features of vision transformers: CLIP, DINOv2 (also with registers), DINOv3, SigLIP."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline.errors import ConfigError
from stages.encoders.base import ImageEncoderConfig, Preprocessing, refuse_kind
from stages.encoders.loading import load_weights
from stages.encoders.model_files import ModelFiles, hf_config

if TYPE_CHECKING:
    from torch import Tensor

_CLIP, _SIGLIP = ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model")
_DINO = ("dinov2", "dinov2_with_registers", "dinov3_vit")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LOOKS = dict.fromkeys(_DINO, _IMAGENET) | dict.fromkeys(_SIGLIP, ((0.5,) * 3, (0.5,) * 3))
"""Mean and deviation of models in whose folder is no preprocessor_config.json; of others CLIP's."""


class PatchEncoderConfig(ImageEncoderConfig):
    """A vision transformer, whose states of the patches are stored as arrays: (rows, columns, dim) of each image."""

    machine_fields = ImageEncoderConfig.machine_fields | {"mirrored"}

    kind: Literal["auto"] = "auto"
    output: Literal["patches"] = "patches"
    """The states of the patches, without class and register tokens."""
    layer: int | None = Field(default=None, ge=1)
    """The block whose output is stored, counted from 1; null: the model's last state (of DINO and SigLIP with the norm
    behind the last block)."""
    input_px: int = Field(default=224, ge=1)
    """Side in pixels that images are resized to, a multiple of the model's patch; an image of an aspect-ratio bucket
    has its ratio and about as many patches. REPA takes 224 for images of 256 px and patches of 14."""
    dtype: Literal["float16", "int8"] = "int8"
    """Type of the stored features; int8 keeps one scale per patch, in the array NAME-scale."""
    mirrored: bool = True
    """Also the features of the mirrored images, as NAME-mirrored, which trainings with views.horizontal_flip need:
    they are not the mirrored features. Can be added later; doubles time and size."""

    def dim(self, files: ModelFiles) -> int:
        return int(self._vision(files).hidden_size)

    def preprocessing(self, files: ModelFiles) -> Preprocessing:
        path = files.folder / "preprocessor_config.json"
        found = Preprocessing.read(path, self.input_px)
        if not path.is_file() and (looks := _LOOKS.get(str(files.config.get("model_type")))):
            found = replace(found, mean=looks[0], std=looks[1])
        return found

    def patch_px(self, files: ModelFiles) -> int:
        """Side of a patch.

        Raises:
            ConfigError: input_px is no multiple of it, or the model has no such layer.
        """
        vision = self._vision(files)
        side, layers = int(vision.patch_size), int(vision.num_hidden_layers)
        if self.input_px % side:
            raise ConfigError(
                f"image_encoders.{self.name}.input_px is {self.input_px}, which is no multiple of the patches of "
                f"{self.model}, {side} px; take {max(side, self.input_px // side * side)}"
            )
        if self.layer is not None and self.layer > layers:
            raise ConfigError(
                f"image_encoders.{self.name}.layer is {self.layer}, but {self.model} has {layers} layers; take one of "
                "them, or null"
            )
        return side

    def grid(self, shape: tuple[int, int], patch_px: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image of this shape, of its ratio as nearly as whole patches are."""
        ratio, count = math.sqrt(shape[0] / shape[1]), self.input_px / patch_px
        return max(1, round(count * ratio)), max(1, round(count / ratio))

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> "Callable[[Tensor], Tensor]":
        """Loads the weights; the result maps prepared images (batch, 3, height, width) to (batch, patches, dim)."""
        from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

        kind, patch_px = files.config.get("model_type"), self.patch_px(files)
        model_class = CLIPVisionModel if kind in _CLIP else SiglipVisionModel if kind in _SIGLIP else AutoModel
        options = {} if kind in _DINO else {"interpolate_pos_encoding": True}  # DINO's do so by themselves
        model = load_weights(model_class, files, dtype, device)

        def encode(pixels: "Tensor") -> "Tensor":
            result = model(pixel_values=pixels, output_hidden_states=self.layer is not None, **options)
            states = result.last_hidden_state if self.layer is None else result.hidden_states[self.layer]
            count = (pixels.shape[-2] // patch_px) * (pixels.shape[-1] // patch_px)
            return states[:, -count:]  # class and register tokens come first

        return encode

    def _vision(self, files: ModelFiles) -> Any:
        """The configuration of the vision half."""
        if files.config.get("model_type") not in (*_CLIP, *_SIGLIP, *_DINO):
            raise refuse_kind(
                self.model, files, "vision transformer with patches", "give a CLIP, DINOv2, DINOv3 (ViT) or SigLIP"
            )
        config = hf_config(files)
        return getattr(config, "vision_config", config)
