"""Perceptual hashes against ImageHash."""

import imagehash
import numpy as np
from PIL import Image, ImageOps

from stages.duplicates.hashing import PLAIN, hash_image
from stages.images import resize_square
from tests.stages.duplicates.paintings import painting


def test_the_perceptual_hashes_are_those_of_imagehash_plain_and_mirrored() -> None:
    for seed in range(20):
        pixels = np.array(painting(seed))
        found = hash_image(pixels).perceptual
        gray = Image.fromarray(resize_square(pixels, 64)).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        for place, view in ((PLAIN, gray), (PLAIN + 1, ImageOps.mirror(gray))):
            assert found[place] == np.packbits(imagehash.phash(view).hash.ravel()).view("<u8")[0]
