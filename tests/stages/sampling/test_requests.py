"""Which images a sampling generates: prompts times images per prompt, each with its seed."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from stages.sampling.config import RequestConfig
from stages.sampling.requests import resolve_requests


def requested(**settings: Any) -> list[tuple[str, str, int]]:
    config = RequestConfig.model_validate(settings)
    return [(image.name, image.prompt, image.seed) for image in resolve_requests(config)]


def test_a_prompts_file_has_one_prompt_per_line_and_each_image_the_next_seed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n\n a ring \n")
    assert requested(prompts_file=str(tmp_path / "prompts.txt"), num_images_per_prompt=2, seed=7) == [
        ("00000.png", "a star", 7),
        ("00001.png", "a star", 8),
        ("00002.png", "a ring", 9),
        ("00003.png", "a ring", 10),
    ]


def test_seeds_may_be_listed_one_per_image() -> None:
    assert [seed for _, _, seed in requested(prompts=["a star", "a ring"], seeds=[40, 2])] == [40, 2]
    with pytest.raises(ConfigError, match="seeds: 3 given for 2 images; give one per image"):
        requested(prompts=["a star", "a ring"], seeds=[1, 2, 3])
