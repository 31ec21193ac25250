"""Crops that the loader reads: the pixels of the full image at the requested place."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from imagen_core import store as st
from tests.imagen_core.store.handmade_store import Made

Make = Callable[..., Made]


def places(numbers: Sequence[int]) -> np.ndarray:
    """From corner to corner as numbers go on."""
    return np.array([[(n * 0.37) % 1, (n * 0.61) % 1] for n in numbers]).reshape(-1, 2)


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_a_crop_is_that_part_of_every_size(make: Make, store_format: st.StoreFormat, codec: st.Codec) -> None:
    made = make(store_format=store_format, codec=codec)
    store = st.Store.open(made.path)
    loader = store.loader(5, [8, 4], crop=st.Crop(4, places))
    number, corners = 0, set()
    for batch in [batch for _ in range(3) for batch in loader]:
        assert batch["images"][8].shape == (len(batch["keys"]), 3, 4, 4)
        assert batch["images"][4].shape == (len(batch["keys"]), 3, 2, 2)
        for k, key in enumerate(batch["keys"]):
            top, left = (places(range(number, number + 1))[0] * 3).astype(int)
            full = {px: torch.from_numpy(images[made.keys.index(key)]) for px, images in made.images.items()}
            large = full[8][2 * top : 2 * top + 4, 2 * left : 2 * left + 4]
            small = full[4][top : top + 2, left : left + 2]
            assert torch.equal(batch["images"][8][k].permute(1, 2, 0), large)
            assert torch.equal(batch["images"][4][k].permute(1, 2, 0), small)
            corners.add((top, left))
            number += 1
    assert len(corners) > 4
    assert {0, 2} <= {top for top, _ in corners} <= {0, 1, 2}


def test_numbers_go_on_over_epochs_ranks_and_resumed_loaders(make: Make) -> None:
    store = st.Store.open(make(shard_rows=(4, 3)).path)
    seen: list[list[int]] = []

    def noted(numbers: Sequence[int]) -> np.ndarray:
        seen.append(list(numbers))
        return places(numbers)

    loader = store.loader(3, [8], crop=st.Crop(4, noted))
    for _ in range(2):
        list(loader)
    assert seen == [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9], [10, 11, 12], [13]]
    seen.clear()
    other = store.loader(1, [8], rank=1, world_size=2, crop=st.Crop(4, noted))
    other.load_state_dict(loader.state_dict())
    next(iter(other))
    assert seen == [[15]]


def test_an_empty_batch_has_the_crops_sides(make: Make) -> None:
    store = st.Store.open(make(shard_rows=(1,)).path)
    (batch,) = store.loader(2, [8, 4], rank=0, world_size=2, crop=st.Crop(4, places))
    assert batch["images"][8].shape == (0, 3, 4, 4)
    assert batch["images"][4].shape == (0, 3, 2, 2)


def test_raw_images_are_views_of_the_file_so_that_a_crop_costs_only_its_own_part(
    make: Make, store_format: st.StoreFormat
) -> None:
    file = st.Store.open(make(store_format=store_format).path).shard(0).images[8]
    assert np.shares_memory(file.pixels(1), file.pixels(1))


@pytest.mark.parametrize(
    ("side", "images", "message"),
    [
        (9, [8], r"crop of 9 px does not fit images of \[8\] px"),
        (0, [8], r"crop of 0 px does not fit images of \[8\] px"),
        (3, [8, 4], "crop of 3 px must be a multiple of 8/4 = 2"),
    ],
)
def test_a_crop_that_does_not_fit_is_refused(make: Make, side: int, images: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.Store.open(make().path).loader(2, images, crop=st.Crop(side, places))
