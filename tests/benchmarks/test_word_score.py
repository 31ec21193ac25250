"""Images with written words, and reading them back."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.word_score import color_right, letters_right, read_word
from stages.sources.synthetic.scenes import VOCABULARY
from stages.sources.synthetic.words import (
    LETTERS,
    WordScene,
    dots,
    draw_word,
    encode_word,
    is_held_out_word,
    window,
    word_scene,
)

SCENES = [word_scene(0, index, "train") for index in range(300)]


def test_an_image_is_a_function_of_seed_index_and_split() -> None:
    assert [word_scene(0, 3), word_scene(0, 4, "train"), word_scene(5, 3, "held_out")] == [
        WordScene("TY", "cyan", "pink"),
        WordScene("MH", "yellow", "white"),
        WordScene("B", "cyan", "grey"),
    ]


def test_held_out_words_never_occur_in_training() -> None:
    assert not any(is_held_out_word(scene.word) for scene in SCENES)
    assert all(is_held_out_word(word_scene(0, index, "held_out").word) for index in range(50))
    share = np.mean([is_held_out_word(word_scene(0, index).word) for index in range(2000)])
    assert 0.08 < share < 0.15
    with pytest.raises(ValueError, match="split must be"):
        word_scene(0, 0, "test")  # type: ignore[arg-type]


def test_captions_name_colours_and_not_letters() -> None:
    for scene in SCENES:
        (caption,) = scene.captions
        assert set(caption.split()) <= set(VOCABULARY)
        assert scene.color in caption.split()
        assert 1 <= len(scene.word) <= 2
        assert set(scene.word) <= set(LETTERS)
    assert WordScene("AB", "red", "white").captions == ("there is red",)
    assert WordScene("AB", "red", "grey").captions == ("there is red on a grey background",)


def test_letters_are_all_different_and_drawn_in_their_colours() -> None:
    assert len(LETTERS) == 26
    assert len({dots(letter).tobytes() for letter in LETTERS}) == 26
    expected = ["..#..", "..#..", "..#..", "..#..", "..#..", "..#.."]
    rows = ["".join("#" if dot else "." for dot in row) for row in window(dots("AT"), 1)]
    assert rows == ["#####", *expected]
    image = draw_word(WordScene("AT", "red", "grey"))
    assert image.shape == (16, 16, 3)
    assert image[4, 9].tolist() == [220, 30, 30]
    assert image[5, 9].tolist() == [205, 205, 205]


def test_an_image_file_resized_to_16_px_is_read_back() -> None:
    for scene in SCENES[:60]:
        image = Image.open(io.BytesIO(encode_word(scene)))
        assert image.size == (64, 64)
        small = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
        assert read_word(small) == scene.word.ljust(2)
        assert letters_right(small, scene.word) == [True] * 2
        assert color_right(small, scene)
        assert not color_right(small, replace(scene, color="red" if scene.color != "red" else "blue"))


def test_wrong_letters_and_empty_images_are_not_read_as_right() -> None:
    image = draw_word(WordScene("AB", "black", "white"))
    assert letters_right(image, "AX") == [True, False]
    assert letters_right(image, "A") == [True, False]
    assert read_word(np.full((16, 16, 3), 90, np.uint8)) == "  "
    noise = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    assert np.mean([letters_right(p, s.word)[0] for p, s in zip(noise, SCENES, strict=True)]) < 0.1
