"""Images that are not square: their centre squares are compared, and found to be as large before any is read."""

from pathlib import Path

from imagen_core.store import Store
from stages.evaluation.checks import expected_images
from stages.evaluation.features.image_sets import image_samples
from stages.sampling.caption_sets import Caption
from stages.sampling.requests import ImageRequest
from tests.imagen_core.store.handmade_store import make_store
from tests.stages.sampling.test_shapes import make_cascade


def test_the_sides_of_a_stores_images_are_those_of_their_centre_squares(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "store", shard_rows=(4,), buckets=True).path)
    images = image_samples(store, "store", 8, [3, 1, 2], "reference")
    assert list(images.sides()) == [6, 6, 8]
    assert [pixels.shape for pixels in images.read()] == [(6, 10, 3), (10, 6, 3), (8, 8, 3)]
    squares = Store.open(make_store(tmp_path / "squares", shard_rows=(4,)).path)
    assert list(image_samples(squares, "squares", 8, [3, 1], "reference").sides()) == [8, 8]


def test_images_to_be_generated_are_as_large_as_their_shape_says() -> None:
    shapes = (None, (6, 10), (10, 6))
    requests = [ImageRequest(index, Caption("a"), index, shape=shape) for index, shape in enumerate(shapes)]
    cascade = make_cascade(8, 32)
    assert list(expected_images(requests, cascade, 8).sides()) == [8, 6, 6]
    assert list(expected_images(requests, cascade, 32).sides()) == [32, 24, 24]
