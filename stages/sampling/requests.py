"""Which images a sampling generates, and which of them are this process's."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imagen_core.cascade import Cascade
from imagen_core.models.conditioning.characters import character_ids
from imagen_core.store.buckets import Shape
from pipeline.errors import ConfigError
from stages.captions import is_valid_text
from stages.lines import split_lines
from stages.places import read_place
from stages.sampling.caption_sets import Caption
from stages.sampling.config import PartConfig, RequestConfig


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image to generate."""

    index: int
    caption: Caption
    seed: int
    low_res: str | None = None
    """Path of the image to super-resolve."""
    init_image: str | None = None
    """Path of the image to start from."""
    condition_images: tuple[tuple[str, str], ...] = ()
    """Name and path of each further image that stages read."""
    shape: Shape | None = None
    """Height and width of the first stage's image; None: a square."""

    @property
    def paths(self) -> list[str]:
        """Of all images that are read for it."""
        given = (self.low_res, self.init_image, *(path for _, path in self.condition_images))
        return [path for path in given if path is not None]

    @property
    def prompt(self) -> str:
        return self.caption.text

    @property
    def transcription(self) -> str:
        return self.caption.transcription or ""

    @property
    def label(self) -> int:
        """-1 where it is not known."""
        return -1 if self.caption.label is None else self.caption.label

    @property
    def name(self) -> str:
        return f"{self.index:05d}.png"


def resolve_requests(config: RequestConfig) -> list[ImageRequest]:
    """The images of all processes: `num_images_per_prompt` per prompt, each with its seed.

    Raises:
        ConfigError: no prompt, an unreadable file, or the wrong number of seeds.
    """
    captions, per_prompt = _captions(config), config.num_images_per_prompt
    count = len(captions) * per_prompt
    seeds = config.seeds or tuple(range(config.seed, config.seed + count))
    if len(seeds) != count:
        raise ConfigError(f"seeds: {len(seeds)} given for {count} images; give one per image, or `seed`")
    low_res = config.low_res or (None,) * len(captions)
    init_images = (None,) * len(captions) if config.init is None else config.init.images
    further = [
        tuple((name, paths[k]) for name, paths in config.condition_images.items()) for k in range(len(captions))
    ]
    return [
        ImageRequest(index, captions[prompt], seed, low_res[prompt], init_images[prompt], further[prompt])
        for index, seed in enumerate(seeds)
        for prompt in [index // per_prompt]
    ]


def process_share(part: PartConfig | None) -> tuple[int, int]:
    """Which share of how many this process generates: `part`, or RANK of WORLD_SIZE, or 0 of 1."""
    if part is not None:
        return part.index, part.count
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_requests(requests: Sequence[ImageRequest], cascade: Cascade) -> None:
    """Refuses requests that the cascade cannot serve.

    Raises:
        ConfigError: low-resolution images, transcriptions or labels that are missing, unusable, or read by no stage.
    """
    first, size_px = cascade.stages[0], cascade.sizes_px[0]
    has_low_res = any(request.low_res is not None for request in requests)
    if first.is_super_resolution and not has_low_res:
        raise ConfigError(
            f"low_res: the first stage ({size_px} px) needs a low-resolution image; give one per prompt, "
            "or start with a base stage"
        )
    if has_low_res and not first.is_super_resolution:
        raise ConfigError(
            f"low_res: the first stage ({size_px} px) is a base model and reads no image; leave base "
            "stages out of `stages`, or use init.images"
        )
    _check_condition_images(requests, cascade)
    _check_transcriptions(requests, cascade.max_characters)
    _check_labels(requests, cascade.num_classes)


def further_images(cascade: Cascade) -> dict[str, int]:
    """Channels of each further image that a stage reads, by name."""
    return {name: number for stage in cascade.stages for name, number in stage.further_images.items()}


def _check_condition_images(requests: Sequence[ImageRequest], cascade: Cascade) -> None:
    """Raises ConfigError if some are missing, or no stage reads them, or no image file has their channels."""
    given = {name for request in requests for name, _ in request.condition_images}
    read = further_images(cascade)
    for name, channels in read.items():
        if name not in given:
            raise ConfigError(
                f"condition_images: the stages read {sorted(read)}, but {name!r} is missing; give "
                f"condition_images={{{name}: [FILE]}}, one file per prompt"
            )
        if channels not in (1, 3):
            raise ConfigError(
                f"condition_images.{name}: the stages read {channels} channels, and files of images have 1 or 3; "
                "sample with Cascade.sample in Python"
            )
    if unknown := sorted(given - read.keys()):
        raise ConfigError(
            f"condition_images.{unknown[0]}: no stage reads it (they read {sorted(read)}); leave it out, or give the "
            "checkpoint of a model that was trained with it"
        )


def _check_transcriptions(requests: Sequence[ImageRequest], max_characters: int | None) -> None:
    """Raises ConfigError if some are too long, are no text, or were given by the user and no stage reads them."""
    if max_characters is None:
        texts = [request.transcription for request in _without_store(requests)]
        if any(texts):
            raise ConfigError(
                f"transcriptions: no stage reads them (got {max(texts)!r}); leave them out, or give the checkpoint of "
                "a model with denoiser.unet.transcription"
            )
        return
    texts = [request.transcription for request in requests]
    bad = next((text for text in texts if not is_valid_text(text)), None)
    if bad is not None:
        raise ConfigError(f"transcriptions: {bad!r} is not valid text; write it in UTF-8")
    try:
        character_ids(texts, max_characters)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_labels(requests: Sequence[ImageRequest], num_classes: int | None) -> None:
    """Raises ConfigError if some are no classes, or were given by the user and no stage reads them."""
    if num_classes is None:
        labels = [each.label for each in _without_store(requests) if each.caption.label is not None]
        if labels:
            raise ConfigError(
                f"labels: no stage reads them (got {labels[0]}); leave them out, or give the checkpoint of a "
                "model with denoiser.unet.num_classes"
            )
        return
    wrong = [request.label for request in requests if not -1 <= request.label < num_classes]
    if wrong:
        raise ConfigError(
            f"labels: {wrong[0]} is no class; the stages know 0 to {num_classes - 1}, and -1 for unknown ones"
        )


def _without_store(requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """Requests the user wrote; what comes with a store's captions may stay unread."""
    return [request for request in requests if request.caption.sample is None]


def _captions(config: RequestConfig) -> list[Caption]:
    captions = _prompts(config) if config.captions is None else config.captions.captions()
    lists = config.lists()
    if not captions:
        images = max(map(len, lists.values())) or int(config.inpaint is not None)
        if not images:
            raise ConfigError("prompts: none given; use prompts='[a small red circle]' or prompts_file=FILE")
        captions = [Caption("")] * images
    for name, entries in lists.items():
        if entries and len(entries) != len(captions):
            raise ConfigError(f"{name}: {len(entries)} given for {len(captions)} prompts; give one each")
    if config.transcriptions:
        texts = zip(captions, config.transcriptions, strict=True)
        captions = [replace(caption, transcription=text) for caption, text in texts]
    if config.labels:
        captions = [replace(caption, label=n) for caption, n in zip(captions, config.labels, strict=True)]
    return captions


def _prompts(config: RequestConfig) -> list[Caption]:
    if config.prompts_file is None:
        return [Caption(prompt) for prompt in config.prompts]
    try:
        lines = split_lines(read_place(config.prompts_file), errors="strict")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts_file {config.prompts_file}: cannot be read ({error}); give a UTF-8 text file"
        ) from error
    parts = [line.partition("\t") for line in lines if line.strip()]
    return [Caption(prompt.strip(), transcription=text if tab else None) for prompt, tab, text in parts]
