"""Images with a written word, drawn by code: one or two letters in a plain colour on a plain background.

The caption names the colours and the transcription the letters, so that neither says what the other does. An image
is a pure function of (seed, index, split), as that of `scenes` is.
"""

import hashlib
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.sources.synthetic.scenes import BACKGROUNDS, COLORS, RandomChoices, Rgb, Split, check_split
from stages.sources.synthetic.shapes import encode_png

PLACES = 2
"""Letters a word may have; letter i is always at place i."""
GRID = 16
"""Side of the image in dots; each is drawn as 4 x 4 pixels."""
_DOT_PX = 4
_WIDTH, _HEIGHT, _PITCH, _LEFT, _TOP = 5, 7, 7, 2, 4  # of a letter, in dots
_FONT = {
    "A": "0e11111f111111",
    "B": "1e11111e11111e",
    "C": "0e11101010110e",
    "D": "1e11111111111e",
    "E": "1f10101e10101f",
    "F": "1f10101e101010",
    "G": "0e11101713110f",
    "H": "1111111f111111",
    "I": "0e04040404040e",
    "J": "0702020202120c",
    "K": "11121418141211",
    "L": "1010101010101f",
    "M": "111b1515111111",
    "N": "11191915131311",
    "O": "0e11111111110e",
    "P": "1e11111e101010",
    "Q": "0e11111115120d",
    "R": "1e11111e141211",
    "S": "0f10100e01011e",
    "T": "1f040404040404",
    "U": "1111111111110e",
    "V": "11111111110a04",
    "W": "1111111515150a",
    "X": "11110a040a1111",
    "Y": "11110a04040404",
    "Z": "1f01020408101f",
}
"""Each letter's rows of five dots, two hexadecimal digits per row."""
LETTERS = "".join(_FONT)


@dataclass(frozen=True, slots=True)
class WordScene:
    """A word and its colours."""

    word: str
    """One or two of the letters A to Z: the transcription."""
    color: str
    """A key of COLORS."""
    background: str
    """A key of BACKGROUNDS; captions name it unless it is white."""

    @property
    def captions(self) -> tuple[str, ...]:
        ending = "" if self.background == "white" else f" on a {self.background} background"
        return (f"there is {self.color}{ending}",)


def word_scene(seed: int, index: int, split: Split = "all") -> WordScene:
    """Compose image `index` of the endless list named by `seed` and `split`; "train" has no held-out word."""
    check_split(split)
    for attempt in count():
        draws = RandomChoices(f"words/{seed}/{index}/{attempt}")
        word = "".join(draws.choose(LETTERS) for _ in range(draws.choose(range(1, PLACES + 1))))
        if split == "all" or is_held_out_word(word) == (split == "held_out"):
            return WordScene(word, draws.choose(tuple(COLORS)), draws.choose(tuple(BACKGROUNDS)))
    raise AssertionError("unreachable: count() has no end")


def is_held_out_word(word: str) -> bool:
    """Whether a word is kept out of training: about 10% of all, and the same for every seed."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % 10 == 0


def dots(word: str) -> NDArray[np.bool_]:
    """The word's ink, (GRID, GRID)."""
    ink = np.zeros((GRID, GRID), np.bool_)
    for place, letter in enumerate(word):
        rows = np.frombuffer(bytes.fromhex(_FONT[letter]), np.uint8)
        window(ink, place)[:] = np.unpackbits(rows[:, None], axis=1)[:, -_WIDTH:]
    return ink


def window(image: NDArray, place: int) -> NDArray:
    """The letter at a place of (GRID, GRID, ...): a view of 7 x 5 dots."""
    left = _LEFT + place * _PITCH
    return image[_TOP : _TOP + _HEIGHT, left : left + _WIDTH]


def draw_word(scene: WordScene) -> NDArray[np.uint8]:
    """uint8 (GRID, GRID, 3), RGB, 0..255: one pixel a dot."""
    colors: tuple[Rgb, Rgb] = BACKGROUNDS[scene.background], COLORS[scene.color]
    return np.array(colors, np.uint8)[dots(scene.word).astype(np.intp)]


def encode_word(scene: WordScene) -> bytes:
    """The image as an RGB PNG file of 64 x 64 pixels."""
    return encode_png(Image.fromarray(draw_word(scene).repeat(_DOT_PX, axis=0).repeat(_DOT_PX, axis=1)))
