"""Generates the image embeddings that a decoder reads, from prompts, with a prior."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imagen_core.diffusion import PriorConfig
from imagen_core.models.conditioning.base import Conditioning, unit_variance
from imagen_core.prior import generate_embeddings
from imagen_core.store import Store
from imagen_core.text_batch import pad_text, pad_texts, token_shape
from imagen_core.train import LoadedDenoiser, TrainError
from pipeline.errors import ConfigError
from stages.checkpoints.load import load_checkpoint_from, origin
from stages.encoders.identity import identity_changes
from stages.sampling.config import SamplePriorConfig
from stages.sampling.requests import ImageRequest
from stages.sampling.text_embeddings import EncoderModel, PromptEmbeddings, PromptTokens


class PriorSampler:
    """A trained prior, and the encoders of the captions it reads."""

    def __init__(
        self,
        settings: SamplePriorConfig,
        *,
        store: Store | None,
        encoder_model: EncoderModel,
        device: torch.device,
        autocast: torch.dtype | None,
    ):
        """`store` holds the captions, if they are a store's; `encoder_model` is where the stages' text encoder is.

        Raises:
            ConfigError: the checkpoint is missing, damaged, or no prior.
        """
        try:
            self._loaded = load_checkpoint_from(settings.checkpoint, settings.weights, settings.lora)
        except TrainError as error:
            raise ConfigError(f"prior.checkpoint: {error}") from error
        if not isinstance(self._loaded.denoiser.config, PriorConfig):
            raise ConfigError(
                "prior.checkpoint: its model generates images; give a training with denoiser.kind: prior"
            )
        self._settings, self._device, self._autocast = settings, device, autocast
        use_gpu = device.type == "cuda"
        vector, tokens = self._loaded.embed_encoders["text_embed"], self._loaded.encoder
        model, option = settings.encoder_model, "prior.encoder_model"
        self._vectors = PromptEmbeddings(vector, store, model=model, use_gpu=use_gpu, option=option)
        if isinstance(tokens, list) or not same_model(tokens, vector):
            model, option = encoder_model, "encoder_model"
        self._tokens = PromptTokens(tokens, store, model=model, use_gpu=use_gpu, option=option)

    @property
    def token_encoders(self) -> list[str]:
        """Names of the text encoders whose tokens it reads."""
        return self._tokens.names

    @property
    def origin(self) -> dict[str, object]:
        """Which checkpoint it is from."""
        return origin(self._loaded)

    def check_decoder(self, trained_on: Mapping[str, Any] | None) -> None:
        """Refuses a decoder that was trained on other embeddings than this prior generates.

        Raises:
            ConfigError: names each field that differs.
        """
        if trained_on is None:
            raise ConfigError("prior: no stage of the cascade reads image embeddings; leave the prior out")
        mine = self._loaded.embed_encoders["image_embed"]
        changes = identity_changes(trained_on["fingerprint"], mine["fingerprint"])
        if changes:
            raise ConfigError(
                f"prior.checkpoint: generates embeddings of another image encoder than the stages read: "
                f"{'; '.join(changes)}; train both on one store"
            )

    def encode(self, requests: Sequence[ImageRequest]) -> None:
        """Encodes the prompts that `generate` will need."""
        self._vectors.encode(requests)
        self._tokens.encode(requests)

    def generate(self, requests: Sequence[ImageRequest]) -> Tensor:
        """(b, dim) unit vectors, float32 on the CPU; each depends on its prompt and seed alone."""
        vectors, tokens = self._vectors.of(requests), self._tokens.of(requests)
        assert vectors is not None
        embeds, _ = pad_text(vectors, len(requests), token_shape(self._loaded.embed_encoders["text_embed"]))
        text, mask = pad_texts(tokens, len(requests), self._loaded.encoder)
        assert embeds is not None
        conditioning = Conditioning(text=text, text_mask=mask, text_embed=unit_variance(embeds[:, 0]))
        conditioning = conditioning.map_text(lambda tensor: tensor[:, : self._loaded.max_tokens]).to(self._device)
        denoiser = self._loaded.denoiser.to(self._device)
        seeds = [request.seed for request in requests]
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            generated = generate_embeddings(denoiser, conditioning, seeds, self._settings.sampling)
        denoiser.to("cpu")  # the cascade needs the room
        return generated.cpu()


def same_model(tokens: Mapping[str, Any] | None, vector: Mapping[str, Any]) -> bool:
    """Whether two records of encoders name one model."""
    return tokens is not None and tokens["fingerprint"].get("model") == vector["fingerprint"].get("model")


def load_prior(
    settings: SamplePriorConfig | None,
    stages: Sequence[LoadedDenoiser],
    *,
    store: Store | None,
    encoder_model: EncoderModel,
    device: torch.device,
    autocast: torch.dtype | None,
) -> PriorSampler | None:
    """The prior that fits the stages; None if no stage needs one. The arguments are those of `PriorSampler`.

    Raises:
        ConfigError: one is missing, not needed, or does not fit.
    """
    readers = [stage.embed_encoders["image_embed"] for stage in stages if "image_embed" in stage.embed_encoders]
    if settings is None:
        if readers:
            raise ConfigError(
                f"prior: the stages read image embeddings of {readers[0]['name']!r}; give prior.checkpoint, a "
                "training with denoiser.kind: prior"
            )
        return None
    prior = PriorSampler(settings, store=store, encoder_model=encoder_model, device=device, autocast=autocast)
    prior.check_decoder(readers[0] if readers else None)
    for reader in readers[1:]:
        prior.check_decoder(reader)
    return prior
