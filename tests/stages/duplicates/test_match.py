"""Which image is kept in place of which."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from stages.duplicates.hashing import hash_image
from stages.duplicates.match import Matches, match
from tests.stages.duplicates.paintings import altered, jpeg, painting, recoloured


def matches(images: Sequence[Image.Image], num_excluded: int = 0, *, near: bool = True) -> Matches:
    hashes = [hash_image(np.array(image)) for image in images]
    thumbnails = np.stack([h.thumbnail for h in hashes])
    return match(
        np.stack([np.frombuffer(h.pixels, np.uint8) for h in hashes]),
        np.stack([h.perceptual for h in hashes]),
        num_excluded,
        thumbnails.__getitem__ if near else None,
    )


def test_every_altered_copy_is_a_near_duplicate_of_its_original_alone() -> None:
    originals = [painting(seed) for seed in range(4)]
    copies = [(place, copy) for place, image in enumerate(originals) for copy in altered(image).values()]
    found = matches([*originals, *(copy for _, copy in copies)])
    assert found.kept.tolist() == [*range(4), *(place for place, _ in copies)]
    assert not found.equal.any()
    names = list(altered(originals[0]))
    assert found.mirrored.tolist() == [False] * 4 + [name == "mirror" for _ in originals for name in names]


def test_images_of_the_same_shapes_in_other_colours_are_none() -> None:
    image = painting(0)
    assert matches([image, recoloured(image)]).kept.tolist() == [0, 1]


def test_images_of_one_colour_each_are_none() -> None:
    plain = [Image.new("RGB", (64, 64), (level, level, 128)) for level in (0, 40, 80)]
    assert matches([*plain, plain[1]]).kept.tolist() == [0, 1, 2, 1]


def test_only_equal_images_are_found_without_near() -> None:
    image = painting(0)
    found = matches([image, jpeg(image), image], near=False)
    assert (found.kept.tolist(), found.equal.tolist()) == ([0, 1, 0], [False, False, True])


def test_a_copy_of_a_near_duplicate_names_the_image_that_is_kept() -> None:
    image, other = painting(0), jpeg(painting(0))
    found = matches([image, other, other])
    assert (found.kept.tolist(), found.equal.tolist()) == ([0, 0, 0], [False, False, True])


def test_what_comes_later_changes_nothing_of_what_was_found_before() -> None:
    images = [copy for seed in range(3) for copy in (painting(seed), *altered(painting(seed)).values())]
    images = [images[place] for place in np.random.default_rng(0).permutation(len(images))]
    everything = matches(images).kept
    for count in (5, 11, 17):
        assert matches(images[:count]).kept.tolist() == everything[:count].tolist()


def test_excluded_images_come_first_and_are_not_compared_with_each_other() -> None:
    image = painting(0)
    assert matches([image, jpeg(image), image, painting(1)], num_excluded=2).kept.tolist() == [0, 1, 0, 3]
