"""What images are stored: their sizes, their shapes and how they are made."""

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from imagen_core.store import Codec, Shape, check_codec, choose_shape, codec_settings
from imagen_core.store.buckets import DEFAULT_MAX_RATIO, SIDE_MULTIPLE, bucket_shapes, scaled
from pipeline.config import Config


@cache
def _shapes(base_px: int, max_ratio: float, size_px: int) -> tuple[Shape, ...]:
    return scaled(bucket_shapes(base_px, max_ratio), base_px, size_px)


class ImagesConfig(Config):
    """The images to store."""

    sizes_px: tuple[int, ...] = (64, 256)
    """Side lengths; each is made from the decoded original, antialiased, never from another size. []: no images are
    stored, and none is decoded."""
    aspect: Literal["square", "buckets"] = "square"
    """square: the centre square of each image, the rest is cut off. buckets: each image is cut to the nearest of a
    list of shapes with about the area of the square, such as 64 x 64, 56 x 72 and 48 x 88 pixels, and so keeps nearly
    all of it."""
    max_aspect_ratio: float = Field(default=DEFAULT_MAX_RATIO, gt=1, le=16)
    """buckets: most that the longer side of a shape is of the shorter one."""
    aspect_base_px: int | None = Field(default=None, ge=SIDE_MULTIPLE)
    """buckets: the size that the list is made for, a multiple of 8; those of other sizes are the same shapes scaled.
    null: the smallest of sizes_px. Set it where a smaller size is to be added later, or is in another store."""
    filter: Literal["bicubic", "lanczos", "box", "bilinear"] = "bicubic"
    """Resampling filter, stretched when shrinking so that it does not alias."""
    codec: Codec | dict[int, Codec] = "raw"
    """How images are stored: raw uint8, png or webp (lossless), jpeg (quality 95); or by size, such as
    {1024: webp}, where sizes that are not named are raw."""

    @field_validator("sizes_px")
    @classmethod
    def _check_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
            raise ValueError("give each size once, in pixels")
        return tuple(sorted(sizes))

    @field_validator("codec", mode="before")
    @classmethod
    def _check_codec(cls, codec: object, info: ValidationInfo) -> object:
        for name in codec.values() if isinstance(codec, dict) else [codec]:
            check_codec(name)
        sizes = info.data.get("sizes_px", ())
        if isinstance(codec, dict) and (unknown := {str(size) for size in codec} - {str(size) for size in sizes}):
            raise ValueError(f"names the sizes {', '.join(sorted(unknown))}, but sizes_px is {list(sizes)}")
        return codec

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        if self.aspect == "square" and self.aspect_base_px is not None:
            raise ValueError("aspect_base_px is of aspect: buckets; set that, or leave it out")
        if self.aspect == "buckets" and self.sizes_px:
            base = self.base_px
            if base > self.sizes_px[0]:
                raise ValueError(
                    f"aspect_base_px is {base}, but sizes_px has {self.sizes_px[0]}; it may not be larger"
                )
            if len(_shapes(base, self.max_aspect_ratio, base)) == 1:
                raise ValueError(
                    f"aspect: buckets of {base} px with max_aspect_ratio {self.max_aspect_ratio:g} have no shape but "
                    "the square; use a larger size or ratio, or aspect: square"
                )
            for size in self.sizes_px:
                self.shapes(size)
        return self

    @property
    def base_px(self) -> int:
        """The size that the list of shapes is made for."""
        return self.sizes_px[0] if self.aspect_base_px is None else self.aspect_base_px

    def shapes(self, size_px: int) -> tuple[Shape, ...]:
        """Height and width of each bucket in images of one size; none where they are squares."""
        if self.aspect == "square":
            return ()
        return _shapes(self.base_px, self.max_aspect_ratio, size_px)

    def shapes_of(self, width: int, height: int, sizes_px: Iterable[int]) -> dict[int, Shape]:
        """By size: height and width of the images of an original of this width and height."""
        if self.aspect == "square":
            return {size: (size, size) for size in sizes_px}
        return {size: choose_shape(width, height, self.shapes(size)) for size in sizes_px}

    def possible_shapes(self) -> tuple[Shape, ...]:
        """Height and width of each bucket in images of the smallest size, also of those that squares could have been
        in; none where that size has no other shape than the square."""
        if self.aspect == "buckets" or not self.sizes_px:
            return self.shapes(self.sizes_px[0]) if self.sizes_px else ()
        multiple = self.sizes_px[0] // SIDE_MULTIPLE * SIDE_MULTIPLE
        shapes = _shapes(multiple, self.max_aspect_ratio, multiple) if multiple else ()
        return shapes if len(shapes) > 1 else ()

    def codec_of(self, size_px: int) -> Codec:
        """How images of one size are stored."""
        return self.codec.get(size_px, "raw") if isinstance(self.codec, dict) else self.codec

    def group_config(self, size_px: int) -> dict[str, Any]:
        """How images of one size are made, as in the manifest."""
        shapes = self.shapes(size_px)
        return {
            "filter": self.filter,
            **codec_settings(self.codec_of(size_px)),
            **({"shapes": [list(shape) for shape in shapes]} if shapes else {}),
        }
