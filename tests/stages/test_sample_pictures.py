"""Which pictures a sampling draws: prompts times pictures a prompt, each with its seed."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from stages.sampling.config import SampleConfig
from stages.sampling.requests import pictures_to_draw


def drawn(**settings: Any) -> list[tuple[str, str, int]]:
    config = SampleConfig.model_validate({"stages": [{"checkpoint": "RUN"}], **settings})
    return [(picture.name, picture.prompt, picture.seed) for picture in pictures_to_draw(config)]


def test_a_file_has_one_prompt_a_line_and_each_picture_the_next_seed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n\n a ring \n")
    assert drawn(prompts_file=str(tmp_path / "prompts.txt"), num_images_per_prompt=2, seed=7) == [
        ("00000.png", "a star", 7),
        ("00001.png", "a star", 8),
        ("00002.png", "a ring", 9),
        ("00003.png", "a ring", 10),
    ]


def test_seeds_may_be_listed_one_a_picture() -> None:
    assert [seed for _, _, seed in drawn(prompts=["a star", "a ring"], seeds=[40, 2])] == [40, 2]
    with pytest.raises(ConfigError, match="seeds: 3 given for 2 pictures; give one a picture"):
        drawn(prompts=["a star", "a ring"], seeds=[1, 2, 3])
