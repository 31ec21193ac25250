"""Which images a sampling draws: prompts times images a prompt, each with its seed."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from stages.sampling.config import SampleConfig
from stages.sampling.requests import resolve_requests


def drawn(**settings: Any) -> list[tuple[str, str, int]]:
    config = SampleConfig.model_validate({"stages": [{"checkpoint": "RUN"}], **settings})
    return [(image.name, image.prompt, image.seed) for image in resolve_requests(config)]


def test_a_file_has_one_prompt_a_line_and_each_image_the_next_seed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n\n a ring \n")
    assert drawn(prompts_file=str(tmp_path / "prompts.txt"), num_images_per_prompt=2, seed=7) == [
        ("00000.png", "a star", 7),
        ("00001.png", "a star", 8),
        ("00002.png", "a ring", 9),
        ("00003.png", "a ring", 10),
    ]


def test_seeds_may_be_listed_one_an_image() -> None:
    assert [seed for _, _, seed in drawn(prompts=["a star", "a ring"], seeds=[40, 2])] == [40, 2]
    with pytest.raises(ConfigError, match="seeds: 3 given for 2 images; give one an image"):
        drawn(prompts=["a star", "a ring"], seeds=[1, 2, 3])
