"""A sampling with its models loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from imagen_core.cascade import Cascade
from imagen_core.models.conditioning.characters import character_ids
from pipeline.errors import ConfigError
from stages.captions import is_valid_text
from stages.device import choose_device
from stages.sampling.cascade import load_cascade
from stages.sampling.config import SampleConfig
from stages.sampling.prior import PriorSampler, load_prior
from stages.sampling.requests import ImageRequest, resolve_requests
from stages.sampling.text_embeddings import Embeddings

_SWEPT = frozenset({"text", "labels", "image_embed"})


@dataclass(frozen=True, slots=True)
class SamplingSession:
    """What is loaded once, to draw into one folder or several."""

    config: SampleConfig
    images: list[ImageRequest]
    """Those of all processes."""
    cascade: Cascade
    origins: list[dict[str, object]]
    """Of each stage, which checkpoint it is from."""
    embeddings: Embeddings
    prior: PriorSampler | None
    device: torch.device

    @property
    def sizes_px(self) -> list[int]:
        """Sizes of the images that are kept."""
        return self.cascade.sizes_px if self.config.save_all_sizes else self.cascade.sizes_px[-1:]

    def files(self, root: Path, image: ImageRequest) -> Iterator[tuple[int, Path]]:
        """Size and path of each file of an image."""
        return ((size, root / f"images-{size}" / image.name) for size in self.sizes_px)

    def missing(self, root: Path) -> list[ImageRequest]:
        """Images that the folder has not in all sizes."""
        return [p for p in self.images if not all(path.exists() for _, path in self.files(root, p))]

    def with_guidance(self, weight: float, stages: Literal["all", "first"]) -> "SamplingSession":
        """The same with another weight of captions, labels and image embeddings, at all stages that read them or at
        the first.

        Raises:
            ConfigError: no stage reads any of them.
        """
        session = list(self.cascade.stages)
        chosen = session if stages == "all" else session[:1]
        if not any(stage.conditions & _SWEPT for stage in chosen):
            raise ConfigError("guidance: no stage reads captions, labels or image embeddings; leave it out")
        for number, stage in enumerate(chosen):
            weights: dict[str, float] = dict.fromkeys(_SWEPT & stage.conditions, weight)
            guidance = stage.sampling.guidance.model_copy(update=weights)
            session[number] = replace(stage, sampling=stage.sampling.model_copy(update={"guidance": guidance}))
        configs = list(self.config.stages)
        for number, stage in enumerate(session):  # output_px leaves out the last
            configs[number] = configs[number].model_copy(update={"sampling": stage.sampling})
        config = self.config.model_copy(update={"stages": tuple(configs)})
        return replace(self, config=config, cascade=Cascade(session, self.cascade.encoder))


def prepare(config: SampleConfig) -> SamplingSession:
    """Loads the cascade and finds out what to draw.

    Raises:
        ConfigError: unusable prompts or checkpoints.
    """
    images = resolve_requests(config)
    loaded = load_cascade(config)
    cascade, origins = loaded.cascade, loaded.origins
    if cascade.stages[0].is_super_resolution and not config.low_res:
        raise ConfigError(
            f"low_res: the first stage ({cascade.sizes_px[0]} px) needs a low-resolution image; give one a prompt, "
            "or begin with a base stage"
        )
    if config.low_res and not cascade.stages[0].is_super_resolution:
        raise ConfigError(
            f"low_res: the first stage ({cascade.sizes_px[0]} px) is a base model and reads no image; leave base "
            "stages out of `stages`, or use init_image"
        )
    _check_transcriptions(config, images, cascade)
    _check_labels(config, images, cascade)
    device = choose_device(config.device)
    prior = load_prior(config, loaded.checkpoints, device)
    if prior is not None:
        origins = [*origins, prior.origin]
    embeddings = Embeddings(config, cascade.encoder, model=config.encoder_model, use_gpu=device.type == "cuda")
    return SamplingSession(config, images, cascade, origins, embeddings, prior, device)


def _check_transcriptions(config: SampleConfig, images: Sequence[ImageRequest], cascade: Cascade) -> None:
    """Raises ConfigError if some are too long, are no text, or were asked for and no stage reads them."""
    texts = [image.transcription for image in images]
    if cascade.max_characters is None:
        if config.captions is None and any(texts):
            raise ConfigError(
                f"transcriptions: no stage reads them (got {max(texts)!r}); leave them out, or give the checkpoint of "
                "a model with denoiser.unet.transcription"
            )
        return
    bad = next((text for text in texts if not is_valid_text(text)), None)
    if bad is not None:
        raise ConfigError(f"transcriptions: {bad!r} is not valid text; write it in UTF-8")
    try:
        character_ids(texts, cascade.max_characters)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_labels(config: SampleConfig, images: Sequence[ImageRequest], cascade: Cascade) -> None:
    """Raises ConfigError if some are no classes, or were asked for and no stage reads them."""
    if cascade.num_classes is None:
        if config.labels:
            raise ConfigError(
                f"labels: no stage reads them (got {config.labels[0]}); leave them out, or give the checkpoint of a "
                "model with denoiser.unet.num_classes"
            )
        return
    wrong = [image.label for image in images if not -1 <= image.label < cascade.num_classes]
    if wrong:
        raise ConfigError(
            f"labels: {wrong[0]} is no class; the stages know 0 to {cascade.num_classes - 1}, and -1 for unknown ones"
        )
