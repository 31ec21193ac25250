"""Any other text encoder of transformers: DeBERTa, BERT, RoBERTa, XLM-R, T5Gemma ..., a language model, or the text
side of a vision-language model."""

from collections.abc import Sequence
from typing import Any, Literal

from stages.encoders.base import TokenModel, refuse_kind
from stages.encoders.batches.model_input import CaptionReader, template_start
from stages.encoders.loading import load_weights
from stages.encoders.model_files import ModelFiles, hf_config
from stages.encoders.recipes.config import RecipeConfig

_TOWERS = ("language_model", "text_model")
"""Names of the part of a vision-language model that reads text alone."""


class AutoEncoderConfig(RecipeConfig):
    """A text encoder found by the `model_type` in its config.json, such as DeBERTa-v2 and v3."""

    kind: Literal["auto"] = "auto"
    output: Literal["last_hidden_state", "penultimate"] = "last_hidden_state"
    """The states of the last layer, or of the layer before it."""

    def dim(self, files: ModelFiles) -> int:
        config = hf_config(files)
        text = _text_part(config)
        dim = getattr(text, "hidden_size", None)
        reads_text = hasattr(text, "vocab_size")
        if not reads_text or not isinstance(dim, int) or _model_class(config) is None:
            raise refuse_kind(self.model, files, "text encoder", "give its text part; for CLIP, kind: clip")
        self.check_positions(getattr(text, "max_position_embeddings", None))
        return self.width(dim, text.num_hidden_layers)

    def num_layers(self, files: ModelFiles) -> int:
        return _text_part(hf_config(files)).num_hidden_layers

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> TokenModel:
        from stages.encoders.packed.decoder import PackedDecoder, is_packable
        from stages.encoders.padded import PaddedModel

        config = hf_config(files)
        model_class = _model_class(config)
        alone = {"is_encoder_decoder": False} if _is_half(model_class, config) else {}
        model = load_weights(model_class, files, dtype, device, **alone)
        if model.config.is_encoder_decoder:  # BART and similar models
            model = model.get_encoder()
        elif _has_text_tower(config):
            model = next((part for name in _TOWERS if (part := getattr(model, name, None)) is not None), None)
            if model is None:
                raise refuse_kind(self.model, files, "model with a text side of its own", "give its text part")
        states = self.states(model, _text_part(config).num_hidden_layers)
        if is_packable(_text_part(config)):
            return PackedDecoder(model, self.output, states)
        return PaddedModel(model, self.output, states)

    def shared_start(self, files: ModelFiles, read: CaptionReader) -> list[int]:
        from stages.encoders.packed.decoder import is_packable

        return template_start(read) if is_packable(_text_part(hf_config(files))) else []

    def flops(self, files: ModelFiles, lengths: Sequence[int]) -> float:
        from stages.encoders.padded import count_flops

        config = hf_config(files)
        model_class, text = _model_class(config), _text_part(config)
        if _is_half(model_class, config):
            config.is_encoder_decoder = False
        own = text if getattr(model_class, "config_class", None) is type(text) else config
        if _has_text_tower(config):
            from transformers import AutoModel

            model_class, own = AutoModel, text
        run = self.layers_run(text.num_hidden_layers) / text.num_hidden_layers
        return run * count_flops(model_class, own, lengths, text)


def _text_part(config: Any) -> Any:
    """The part of a configuration that is about encoding text: the encoder's, the text half's, or all of it."""
    for part in ("encoder", "text_config"):
        config = getattr(config, part, None) or config
    return config


def _has_text_tower(config: Any) -> bool:
    """Whether it is a model that writes about images, with a language model as a part."""
    from transformers import AutoModel, AutoModelForImageTextToText

    known = AutoModel._model_mapping, AutoModelForImageTextToText._model_mapping
    return hasattr(config, "text_config") and all(type(config) in mapping for mapping in known)


def _is_half(model_class: Any, config: Any) -> bool:
    """Whether the class is the encoder alone of a model with a decoder."""
    return bool(config.is_encoder_decoder) and model_class.__name__.endswith("EncoderModel")


def _model_class(config: Any) -> Any:
    """The class of transformers to load: that of the text encoder alone, or of the model that has it as its encoder.

    The library's table of text encoders lacks some, such as those of LongT5 and SigLIP; they are found by name.
    Returns None if the model has no such encoder.
    """
    import transformers
    from transformers import AutoModel, AutoModelForTextEncoding

    if type(config) in AutoModelForTextEncoding._model_mapping:
        return AutoModelForTextEncoding._model_mapping[type(config)]
    if _has_text_tower(config):
        return AutoModel
    prefix, text = type(config).__name__.removesuffix("Config"), _text_part(config)
    names = (prefix + suffix for suffix in ("Model", "EncoderModel", "TextModel"))
    whole, encoder, half = (getattr(transformers, name, None) for name in names)
    if encoder is not None:
        return encoder
    if text is config or config.is_encoder_decoder:
        return AutoModel if type(config) in AutoModel._model_mapping else whole
    is_pair = hasattr(whole, "get_text_features") and config.model_type != "clip"  # of an image and a text encoder
    return half if is_pair and getattr(half, "config_class", None) is type(text) else None
