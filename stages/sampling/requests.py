"""Which images a sampling draws, and which of them are this process's."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import ConfigError
from stages.sampling.caption_sets import Caption
from stages.sampling.config import SampleConfig


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image to draw."""

    index: int
    caption: Caption
    seed: int
    source: int
    """Which prompt, low_res and init_image it is drawn from."""

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


def resolve_requests(config: SampleConfig) -> list[ImageRequest]:
    """Prompts times images a prompt, with their seeds; those of all processes.

    Raises:
        ConfigError: no prompt, an unreadable file, or the wrong number of seeds.
    """
    captions, each = _captions(config), config.num_images_per_prompt
    count = len(captions) * each
    seeds = config.seeds or tuple(range(config.seed, config.seed + count))
    if len(seeds) != count:
        raise ConfigError(f"seeds: {len(seeds)} given for {count} images; give one an image, or `seed`")
    return [ImageRequest(index, captions[index // each], seed, index // each) for index, seed in enumerate(seeds)]


def my_part(config: SampleConfig) -> tuple[int, int]:
    """Which part of how many this process draws: `part`, or RANK of WORLD_SIZE, or the whole."""
    if config.part is not None:
        return config.part.index, config.part.count
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _captions(config: SampleConfig) -> list[Caption]:
    if config.captions is not None:
        captions = config.captions.captions()
    else:
        captions = _prompts(config)
    given = {name: getattr(config, name) for name in ("low_res", "init_image", "transcriptions", "labels")}
    if not captions:
        images = max(len(each) for each in given.values()) or int(config.inpaint_image is not None)
        if not images:
            raise ConfigError("prompts: none given; use prompts='[a small red circle]' or prompts_file=FILE")
        captions = [Caption("")] * images
    for name, each in given.items():
        if each and len(each) != len(captions):
            raise ConfigError(f"{name}: {len(each)} given for {len(captions)} prompts; give one each")
    if config.transcriptions:
        texts = zip(captions, config.transcriptions, strict=True)
        captions = [replace(caption, transcription=text) for caption, text in texts]
    if config.labels:
        captions = [replace(caption, label=n) for caption, n in zip(captions, config.labels, strict=True)]
    return captions


def _prompts(config: SampleConfig) -> list[Caption]:
    if config.prompts_file is None:
        return [Caption(prompt) for prompt in config.prompts]
    try:
        lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts_file {config.prompts_file}: cannot be read ({error}); give a UTF-8 text file"
        ) from error
    parts = [line.partition("\t") for line in lines if line.strip()]
    return [Caption(prompt.strip(), transcription=text if tab else None) for prompt, tab, text in parts]
