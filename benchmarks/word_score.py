"""Reads the word in an image back, letter by letter, to compare it with the requested one."""

import numpy as np
from numpy.typing import NDArray

from stages.sources.synthetic.scenes import COLORS
from stages.sources.synthetic.words import LETTERS, PLACES, WordScene, dots, window

CHANCE = 1 / (len(LETTERS) + 1)
"""What guessing would read right of a place: any letter, or none."""
_TEMPLATES = {letter: window(dots(letter), 0).astype(np.float64) for letter in LETTERS} | {" ": np.zeros((7, 5))}
_LEAST_INK = 30.0
"""Distance from the background, in levels, of what counts as ink at all."""


def read_word(image: NDArray[np.uint8]) -> str:
    """The characters at the places of an image (GRID, GRID, 3), uint8 0..255: letters, or " " where there is none.

    Ink is the distance of a dot's colour from the background, the median, as a part of the mean of the largest eight;
    a place is read as the letter whose 7 x 5 dots differ least from its ink in the sum of squares, or as none.
    """
    pixels = image.astype(np.float64)
    distance = np.linalg.norm(pixels - np.median(pixels.reshape(-1, 3), axis=0), axis=-1)
    ink = distance / max(float(np.sort(distance, axis=None)[-8:].mean()), _LEAST_INK)
    return "".join(_read(window(ink, place)) for place in range(PLACES))


def letters_right(image: NDArray[np.uint8], word: str) -> list[bool]:
    """Whether each place shows what it should; places after the word should be empty."""
    return [found == wanted for found, wanted in zip(read_word(image), word.ljust(PLACES), strict=True)]


def _read(ink: NDArray[np.float64]) -> str:
    return min(_TEMPLATES, key=lambda letter: float(((ink - _TEMPLATES[letter]) ** 2).sum()))


def color_right(image: NDArray[np.uint8], scene: WordScene) -> bool:
    """Whether the dots that the word should cover have on average the colour of `scene`, of all COLORS the nearest."""
    mean = image[dots(scene.word)].mean(axis=0)
    return min(COLORS, key=lambda name: float(np.linalg.norm(mean - COLORS[name]))) == scene.color
