"""Captioned scenes drawn by code: plain shapes on a plain background, each with an exact caption.

A scene is a pure function of (seed, index, split). All choices come from a SHAKE-256 stream, so they
do not change with the Python, numpy or Pillow version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.sources.synthetic.shapes import SHAPES, encode_png, shape_mask

Split = Literal["train", "held_out", "all"]
Rgb = tuple[int, int, int]
T = TypeVar("T")

COLORS: dict[str, Rgb] = {
    "red": (220, 30, 30),
    "green": (20, 140, 40),
    "blue": (30, 60, 220),
    "yellow": (250, 215, 0),
    "purple": (130, 30, 160),
    "orange": (250, 125, 0),
    "cyan": (0, 190, 215),
    "black": (15, 15, 15),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (255, 255, 255),
    "grey": (205, 205, 205),
    "pink": (255, 214, 228),
    "beige": (240, 228, 200),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.28, 0.31), "large": (0.40, 0.44)}
"""Extent of an object, lowest and highest, as a fraction of the centre square's side."""
POSITIONS: dict[str, tuple[float, float]] = {
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "centre": (0.5, 0.5),
}
"""Mean centre (x, y) of the object of a single-object scene, in fractions of the centre square."""

_POSITION_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_RELATIONS = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_OTHER_WORDS = "a on background there is"

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {*SHAPES, *COLORS, *BACKGROUNDS, *SIZES}.difference(
            {"white"}
        ).union(  # the background that goes without saying
            *(p.split() for p in (*_POSITION_PHRASES.values(), *_RELATIONS.values(), _OTHER_WORDS))
        )
    )
)
"""Every word a caption may hold, sorted."""

_IMAGE_SIZES_PX = 14 * ((320, 320),) + 3 * ((400, 300), (300, 400))
_BACKGROUND_NAMES = 3 * ("white",) + tuple(BACKGROUNDS)[1:]
_MARGIN = 0.02  # least distance of an object from the edge of the centre square
_GAP = 0.06  # least distance between two objects, along the axis of their relation


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape. Coordinates are fractions in [0, 1] of the centre square; y grows downwards."""

    shape: str
    """One of SHAPES."""
    color: str
    """A key of COLORS."""
    size: str
    """A key of SIZES."""
    position: str
    """A key of POSITIONS; in a two-object scene the side taken, never "centre"."""
    center_x: float
    center_y: float
    """Centre of the bounding box."""
    extent: float
    """Side of the (square) bounding box."""

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two objects on a plain background. All objects lie inside the centre square of the image."""

    objects: tuple[SceneObject, ...]
    background: str
    """A key of BACKGROUNDS; captions name it unless it is white."""
    captions: tuple[str, ...]
    """The main caption, then on every fourth scene a paraphrase. Lower case, 7 to 16 words."""
    width_px: int
    height_px: int

    @property
    def relation(self) -> str | None:
        """How the first object stands to the second ("above"); None with a single object."""
        return _RELATIONS[self.objects[0].position] if len(self.objects) == 2 else None


class RandomChoices:
    """Random choices from a SHAKE-256 stream over a key: the same on every platform, for ever."""

    def __init__(self, key: str):
        stream = hashlib.shake_256(key.encode()).digest(128)
        self._words = (int.from_bytes(stream[i : i + 4], "big") for i in range(0, len(stream), 4))

    def choose(self, options: Sequence[T]) -> T:
        return options[next(self._words) * len(options) >> 32]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._words) / 2**32


def scene(seed: int, index: int, split: Split = "all") -> Scene:
    """Compose scene `index` of the endless list named by `seed` and `split`.

    "train" and "held_out" share no arrangement (see `is_held_out`), whatever the seeds.
    """
    check_split(split)
    for attempt in count():
        candidate = _compose(RandomChoices(f"{seed}/{index}/{attempt}"), paraphrased=index % 4 == 3)
        if split == "all" or is_held_out(candidate) == (split == "held_out"):
            return candidate
    raise AssertionError("unreachable: count() has no end")


def check_split(split: str) -> None:
    """Raises ValueError unless there is such a split."""
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split must be 'train', 'held_out' or 'all' (got {split!r})")


def is_held_out(scene: Scene) -> bool:
    """Whether the arrangement is kept out of training: about 10% of all, and the same for every seed.

    The arrangement is shape, color, size and position of every object. The background and the order in
    which a caption names two objects do not count, so no wording of a held-out scene occurs in training.
    """
    keys = sorted(f"{o.shape} {o.color} {o.size} {o.position}" for o in scene.objects)
    digest = hashlib.sha256("; ".join(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def _compose(draws: RandomChoices, paraphrased: bool) -> Scene:
    width_px, height_px = draws.choose(_IMAGE_SIZES_PX)
    background = draws.choose(_BACKGROUND_NAMES)
    objects = draws.choose((_single, _pair))(draws)
    captions = _captions(objects, background)[: 2 if paraphrased else 1]
    return Scene(objects, background, captions, width_px, height_px)


def _single(draws: RandomChoices) -> tuple[SceneObject, ...]:
    shape, color = draws.choose(SHAPES), draws.choose(tuple(COLORS))
    size, position = draws.choose(tuple(SIZES)), draws.choose(tuple(POSITIONS))
    x, y = (mean + draws.uniform(-0.035, 0.035) for mean in POSITIONS[position])
    return (SceneObject(shape, color, size, position, x, y, draws.uniform(*SIZES[size])),)


def _pair(draws: RandomChoices) -> tuple[SceneObject, ...]:
    """Two objects of different colors, one at each end of an axis."""
    shapes = draws.choose(SHAPES), draws.choose(SHAPES)
    first_color = draws.choose(tuple(COLORS))
    colors = first_color, draws.choose([c for c in COLORS if c != first_color])
    sizes = draws.choose(tuple(SIZES)), draws.choose(tuple(SIZES))
    first_position = draws.choose(tuple(_RELATIONS))
    positions = first_position, _OPPOSITE[first_position]
    extents = tuple(draws.uniform(*SIZES[size]) for size in sizes)
    slack = 1 - 2 * _MARGIN - _GAP - sum(extents)
    objects = []
    for shape, color, size, position, extent in zip(shapes, colors, sizes, positions, extents, strict=True):
        from_edge = _MARGIN + draws.uniform(0, slack / 2) + extent / 2
        along = from_edge if position in ("left", "top") else 1 - from_edge
        across = 0.5 + draws.uniform(-0.1, 0.1)
        x, y = (along, across) if position in ("left", "right") else (across, along)
        objects.append(SceneObject(shape, color, size, position, x, y, extent))
    return tuple(objects)


def _captions(objects: tuple[SceneObject, ...], background: str) -> tuple[str, str]:
    ending = "" if background == "white" else f" on a {background} background"
    first = objects[0]
    if len(objects) == 1:
        place = _POSITION_PHRASES[first.position]
        return f"{first.phrase} {place}{ending}", f"{place} there is {first.phrase}{ending}"
    second = objects[1]
    return (
        f"{first.phrase} {_RELATIONS[first.position]} {second.phrase}{ending}",
        f"{second.phrase} {_RELATIONS[second.position]} {first.phrase}{ending}",
    )


def render(scene: Scene, size_px: int = 320) -> NDArray[np.uint8]:
    """Draw the centre square of a scene: uint8 (size_px, size_px, 3), RGB, 0..255."""
    return np.asarray(_draw(scene, size_px, size_px))


def encode_image(scene: Scene) -> bytes:
    """Draw the whole image, width_px x height_px, as an RGB PNG file."""
    return encode_png(_draw(scene, scene.width_px, scene.height_px))


def _draw(scene: Scene, width_px: int, height_px: int) -> Image.Image:
    image = Image.new("RGB", (width_px, height_px), BACKGROUNDS[scene.background])
    side = min(width_px, height_px)
    left, top = (width_px - side) // 2, (height_px - side) // 2
    for o in scene.objects:
        mask, corner = shape_mask(o.shape, left + o.center_x * side, top + o.center_y * side, o.extent * side)
        image.paste(COLORS[o.color], corner, mask)
    return image
