"""A text encoder of transformers that follows a recipe."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError
from stages.encoders.batches.model_input import CaptionReader
from stages.encoders.model_files import ModelFiles
from stages.encoders.recipes.settings import RecipeSettings


class RecipeConfig(RecipeSettings):
    """What the kinds of encoders share that follow recipes."""

    def reader(self, tokenizer: Any) -> CaptionReader:
        from stages.encoders.recipes.template import RecipeReader

        return RecipeReader(self, tokenizer)

    def reading_settings(self, tokenizer: Any) -> Mapping[str, object]:
        """The text that a chat template writes, which its options do not show; raises as `RecipeReader`."""
        from stages.encoders.recipes.template import RecipeReader

        reader = RecipeReader(self, tokenizer)
        has_chat = self.template is not None and self.template.chat is not None
        return {"chat_text": [reader.before, reader.after]} if has_chat else {}

    def width(self, dim: int, num_layers: int) -> int:
        """Width of a row: that of the model for each of its layers.

        Raises:
            ConfigError: the model has no such layer.
        """
        return dim * len(self._chosen(num_layers))

    @abstractmethod
    def num_layers(self, files: ModelFiles) -> int:
        """How many layers the model has."""

    def joined_layers(self, files: ModelFiles) -> tuple[tuple[int, ...], bool]:
        layers = () if self.layers is None else tuple(self._chosen(self.num_layers(files)))
        if len(layers) < 2 or self.join == "interleave":
            return (), False
        twice = next((layer for layer in layers if layers.count(layer) > 1), None)
        if self.join == "stack" and twice is not None:
            raise ConfigError(
                f"encoders.{self.name}.layers: names layer {twice} twice, and a stack stores each layer once; "
                "leave one out"
            )
        return layers, self.join == "stack"

    def layers_run(self, num_layers: int) -> int:
        """How many of the model's layers are run."""
        return max(self._chosen(num_layers))

    def states(self, model: Any, num_layers: int) -> Any:
        """The `LayerStates` of a loaded model, None if its last hidden states are wanted; raises like `width`."""
        if self.layers is None and self.final_norm is True:
            return None
        from stages.encoders.recipes.states import LayerStates

        return LayerStates(model, self._chosen(num_layers), self.final_norm, self.join)

    def _chosen(self, num_layers: int) -> list[int]:
        from stages.encoders.recipes.states import chosen_layers

        layers = (-1,) if self.layers is None else self.layers
        return chosen_layers(layers, num_layers, f"encoders.{self.name}")
