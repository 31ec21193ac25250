"""Which images a sampling generates: prompts times images per prompt, each with its seed."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from stages.sampling.config import RequestConfig, SampleConfig
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


def test_each_request_has_the_low_res_and_init_image_of_its_prompt() -> None:
    settings = {"prompts": ["a", "b"], "low_res": ["1.png", "2.png"], "init": {"images": ["3.png", "4.png"]}}
    config = RequestConfig.model_validate({**settings, "num_images_per_prompt": 2})
    found = [(request.prompt, request.low_res, request.init_image) for request in resolve_requests(config)]
    assert found == [("a", "1.png", "3.png")] * 2 + [("b", "2.png", "4.png")] * 2


@pytest.mark.parametrize("settings", [{"low_res": ["1.png"]}, {"init": {"images": ["1.png"]}}])
def test_images_to_start_from_need_no_prompt_but_one_image_per_prompt(settings: dict[str, Any]) -> None:
    assert requested(**settings) == [("00000.png", "", 0)]
    key = "low_res" if "low_res" in settings else "init.images"
    with pytest.raises(ValueError, match=f"{key} has 1 entries for 2 prompts; give one each"):
        requested(prompts=["a", "b"], **settings)


def test_the_record_of_a_sampling_has_the_settings_that_change_images_only() -> None:
    stages = [{"checkpoint": "RUN"}]
    plain = SampleConfig.model_validate({"stages": stages}).recorded()
    same = {"output": {"all_sizes": False, "text": True}, "batch_size": 3, "device": "cpu", "labels": [1]}
    assert SampleConfig.model_validate({"stages": stages, **same}).recorded() == plain
    assert "negative_prompt" not in plain
    assert "start" not in str(plain), "records of earlier versions had no such setting"
    changes = ({"output": {"size_px": 64}}, {"seed": 1}, {"init": {"images": ["a"]}}, {"precision": "bfloat16"})
    for change in (*changes, {"negative_prompt": ""}):
        assert SampleConfig.model_validate({"stages": stages, **change}).recorded() != plain
