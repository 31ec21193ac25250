"""Images of soft colours that differ clearly, and altered copies of them."""

import io

import numpy as np
from PIL import Image, ImageOps

SIDE_PX = 96


def painting(seed: int) -> Image.Image:
    """6 x 6 colours that run into each other."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 40) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def altered(image: Image.Image) -> dict[str, Image.Image]:
    """The image compressed, in other sizes, cropped by 5 % in the middle and at two corners, and mirrored."""
    side, edge = image.width, round(image.width * 0.05)
    return {
        "jpeg": jpeg(image),
        "half": image.resize((side // 2, side // 2)),
        "double": image.resize((side * 2, side * 2)),
        "crop": image.crop((edge // 2, edge // 2, side - edge // 2, side - edge // 2)),
        "corner": image.crop((edge, edge, side, side)),
        "other-corner": image.crop((0, edge, side - edge, side)),
        "mirror": ImageOps.mirror(image),
    }


def recoloured(image: Image.Image) -> Image.Image:
    """Of the same brightness, with red and blue exchanged in its middle."""
    pixels = np.array(image)
    middle = slice(SIDE_PX // 4, -SIDE_PX // 4)
    pixels[middle, middle] = pixels[middle, middle, ::-1]
    return Image.fromarray(pixels)
