"""Which images a sampling has, by prompt, and from which files."""

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage
from stages.browse.training.images import ImageSets, by_prompt, columns_of
from tests.stages.browse.training.trainings import sampling


def test_a_sampling_has_its_images_at_each_size(tmp_path: Path) -> None:
    (found,) = ImageSets(LocalStorage(sampling(tmp_path, ["a cat", "a dog"], sizes=(64, 128, 512)))).all()
    assert (found.name, found.sizes_px) == ("", (64, 128, 512))
    assert [(each.index, each.prompt, each.about) for each in found.images] == [
        (0, "a cat", "seed 100"),
        (1, "a dog", "seed 101"),
    ]
    assert found.file(1, 128) == "images-128/00001.png"
    assert [found.file(index, size) for index, size in ((2, 128), (-1, 128), (0, 256))] == [None, None, None]


def test_a_sweep_has_a_set_per_guidance_weight_by_rising_weight(tmp_path: Path) -> None:
    for weight in ("10", "1", "2.5", "1e-05", "-1"):
        sampling(tmp_path / f"guidance-{weight}", ["a cat"], sizes=(4, 8))
    (tmp_path / "features").mkdir()
    sets = ImageSets(LocalStorage(tmp_path)).all()
    assert [each.name for each in sets] == [f"guidance-{weight}" for weight in ("-1", "1e-05", "1", "2.5", "10")]
    assert sets[3].file(0, 8) == "guidance-2.5/images-8/00000.png"
    assert [(each.number, each.size_px) for each in columns_of(sets[:2], None)] == [(0, 8), (1, 8)]
    assert [each.title for each in columns_of(sets[:2], 4)] == ["guidance -1, 4 px", "guidance 1e-05, 4 px"]
    assert [each.title for each in columns_of(sets[:1], None)] == ["4 px", "8 px"]


def test_prompts_are_grouped_and_searched_in_upper_or_lower_case(tmp_path: Path) -> None:
    root = sampling(tmp_path, ["A Cat", "A Cat", "a dog", "A Cat"])
    images = ImageSets(LocalStorage(root)).all()[0].images
    assert [(each.prompt, [i.index for i in each.images]) for each in by_prompt(images, "")] == [
        ("A Cat", [0, 1]),
        ("a dog", [2]),
        ("A Cat", [3]),
    ]
    assert [each.prompt for each in by_prompt(images, "CAT")] == ["A Cat"]
    assert by_prompt(images, "%") == []


@pytest.mark.parametrize(
    "file", ["../../secret.png", "/etc/passwd", "00000.png/../x", "a.png", "0.PNG", "", None, "0.png\n"]
)
def test_a_record_names_no_other_file_than_a_sampling_writes(tmp_path: Path, file: object) -> None:
    sampling(tmp_path, ["a"])
    (tmp_path / "images.json").write_text(json.dumps({"images": [{"file": file, "prompt": "a"}]}))
    with pytest.raises(ConfigError, match=r"images\.json: image 0 has the file"):
        ImageSets(LocalStorage(tmp_path)).all()


@pytest.mark.parametrize("record", ["[]", "{}", '{"images": 3}', '{"images": [1]}', "{"])
def test_a_damaged_record_is_one_line(tmp_path: Path, record: str) -> None:
    (tmp_path / "images.json").write_text(record)
    with pytest.raises(ConfigError, match=r"images\.json") as caught:
        ImageSets(LocalStorage(tmp_path)).all()
    assert "\n" not in str(caught.value)


def test_a_record_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    sets = ImageSets(LocalStorage(sampling(tmp_path, ["first"])))
    assert sets.all()[0].images is sets.all()[0].images
    sampling(tmp_path, ["second", "third"])
    assert [each.prompt for each in sets.all()[0].images] == ["second", "third"]
