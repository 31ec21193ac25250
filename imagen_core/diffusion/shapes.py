"""Height and width of the images of each stage of a cascade, where they are not square."""

from collections.abc import Sequence
from fractions import Fraction

from imagen_core.diffusion.config import DenoiserConfig


def default_shape(stage: DenoiserConfig, low_res: Sequence[int] | None) -> tuple[int, int]:
    """Height and width of a stage's images: a square, or those of its low-resolution image times the stage's factor.

    Args:
        low_res: height and width of the low-resolution image; None if there is none.
    Raises:
        ValueError: they are no whole number of pixels.
    """
    if low_res is None or stage.low_res_px is None or low_res[0] == low_res[1]:
        return stage.size_px, stage.size_px
    factor = Fraction(stage.size_px, stage.low_res_px)
    shape = _scaled(low_res, factor)
    if shape is None:
        raise ValueError(
            f"low_res: {low_res[0]} x {low_res[1]} px times {factor} is no whole number of pixels in the stage of "
            f"{stage.size_px} px"
        )
    return shape


def low_res_shape(stage: DenoiserConfig, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of the image that a stage upsamples to `shape`; None for a base stage.

    Raises:
        ValueError: they are no whole number of pixels.
    """
    if stage.low_res_px is None:
        return None
    low_res = _scaled(shape, Fraction(stage.low_res_px, stage.size_px))
    if low_res is None:
        raise ValueError(
            f"images of {shape[0]} x {shape[1]} px are no whole number of pixels in the {stage.low_res_px} px images "
            f"that the stage of {stage.size_px} px upsamples"
        )
    return low_res


def stage_shapes(stages: Sequence[DenoiserConfig], first: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of the images of each stage, from those of the first.

    Raises:
        ValueError: a side is no whole number of pixels in a stage, or one that its network cannot halve.
    """
    found: list[tuple[int, int]] = []
    for stage in stages:
        factor, divisor = Fraction(stage.size_px, stages[0].size_px), stage.unet.sides_divisor
        shape = _scaled(first, factor)
        if shape is None or shape[0] % divisor or shape[1] % divisor or min(shape) <= 0:
            raise ValueError(
                f"images of {first[0]} x {first[1]} px in the first stage are {float(first[0] * factor):g} x "
                f"{float(first[1] * factor):g} px in the stage of {stage.size_px} px, which needs multiples of "
                f"{divisor} px"
            )
        found.append(shape)
    return found


def _scaled(shape: Sequence[int], factor: Fraction) -> tuple[int, int] | None:
    """The shape times a factor; None if that is no whole number of pixels."""
    height, width = (side * factor for side in shape)
    return (int(height), int(width)) if height.denominator == width.denominator == 1 else None
