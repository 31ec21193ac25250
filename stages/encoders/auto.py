"""Any other text encoder of transformers: DeBERTa, BERT, RoBERTa, XLM-R, T5Gemma ... or a language model."""

from collections.abc import Sequence
from typing import Any, Literal

from stages.encoders.base import EncoderConfig, TokenModel, refuse_kind
from stages.encoders.loading import load_weights
from stages.encoders.model_files import ModelFiles, hf_config


class AutoEncoderConfig(EncoderConfig):
    """A text encoder found by the `model_type` in its config.json, such as DeBERTa-v2 and v3."""

    kind: Literal["auto"] = "auto"
    output: Literal["last_hidden_state", "penultimate"] = "last_hidden_state"
    """The states of the last layer, or of the layer before it."""

    def dim(self, files: ModelFiles) -> int:
        config = hf_config(files)
        dim = getattr(config, "hidden_size", None)
        if not isinstance(dim, int):
            raise refuse_kind(self.model, files, "text encoder", "give its text part; for CLIP, kind: clip")
        self.check_positions(getattr(config, "max_position_embeddings", None))
        return dim

    def build(self, files: ModelFiles, dtype: Any, device: Any) -> TokenModel:
        from transformers import AutoModel, AutoModelForTextEncoding

        from stages.encoders.padded import PaddedModel

        is_encoder = type(hf_config(files)) in AutoModelForTextEncoding._model_mapping
        model = load_weights(AutoModelForTextEncoding if is_encoder else AutoModel, files, dtype, device)
        if model.config.is_encoder_decoder and not is_encoder:  # BART and similar models
            model = model.get_encoder()
        return PaddedModel(model, self.output)

    def flops(self, files: ModelFiles, lengths: Sequence[int]) -> float:
        from transformers import AutoModel

        from stages.encoders.padded import count_flops

        return count_flops(AutoModel, hf_config(files), lengths)
