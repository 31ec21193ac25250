"""Perceptual hashes against ImageHash."""

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from imagen_core.store.buckets import bucket_shapes, choose_shape, crop_box
from stages.duplicates.alike import alike
from stages.duplicates.hashing import PLAIN, hash_image, hash_part, pixels_digest
from stages.duplicates.search import MAX_DISTANCE
from stages.images import resize_square
from stages.images.resample import resize
from tests.stages.duplicates.paintings import painting


def test_the_perceptual_hashes_are_those_of_imagehash_plain_and_mirrored() -> None:
    for seed in range(20):
        pixels = np.array(painting(seed))
        found = hash_image(pixels).perceptual
        gray = Image.fromarray(resize_square(pixels, 64)).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        for place, view in ((PLAIN, gray), (PLAIN + 1, ImageOps.mirror(gray))):
            assert found[place] == np.packbits(imagehash.phash(view).hash.ravel()).view("<u8")[0]


@pytest.mark.parametrize("turned", [False, True])
def test_an_image_of_a_bucket_has_the_hashes_of_its_original(turned: bool) -> None:
    """Of one whose bucket lacks most of the shorter side: a tenth, and so more than the five crops of 5 %."""
    width, height = 640, 553
    shape = choose_shape(width, height, bucket_shapes(64))
    assert shape == (56, 72)
    left, top, right, bottom = crop_box(width, height, shape)
    assert (left, right, bottom - top) == (0, 640, 498)
    for seed in range(20):
        pixels = np.array(painting(seed).resize((width, height), Image.Resampling.BICUBIC))
        part = resize(np.ascontiguousarray(pixels[top:bottom]), (224, 288))
        of_part = (part, width, height)
        if turned:
            pixels, of_part = pixels.transpose(1, 0, 2), (part.transpose(1, 0, 2), height, width)
        expected, found = hash_image(pixels), hash_part(*of_part)
        bits = np.bitwise_count(expected.perceptual[PLAIN] ^ found.perceptual)
        assert bits.min() <= MAX_DISTANCE
        assert alike(expected.thumbnail, found.thumbnail, mirrored=False)
        assert found.pixels == pixels_digest(of_part[0])


def test_a_square_has_the_hashes_of_what_it_is() -> None:
    pixels = np.array(painting(0))
    found, expected = hash_part(pixels, 640, 480), hash_image(pixels)
    assert np.array_equal(found.perceptual, expected.perceptual)
    assert np.array_equal(found.thumbnail, expected.thumbnail)
