"""Files of images that have the shapes of aspect-ratio buckets, in both formats and all codecs."""

from pathlib import Path

import numpy as np
import pytest

from imagen_core import store as st
from imagen_core.store.codec import decode, encode
from tests.imagen_core.store.handmade_store import bucket_list, make_store, rewrite_manifest

CODECS: list[st.Codec] = ["raw", "png", "webp", "jpeg"]
SIZE_PX = 32
SHAPES = bucket_list(SIZE_PX)


def group(store_format: st.StoreFormat, codec: st.Codec, **values: object) -> st.ImagesGroup:
    raw = {"kind": "images", "size_px": SIZE_PX, "format": store_format, "codec": codec}
    parsed = st.parse_group("images-32", {**raw, "config": {"shapes": [list(shape) for shape in SHAPES]}, **values})
    assert isinstance(parsed, st.ImagesGroup)
    return parsed


def made_images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (*SHAPES[row % 3], 3), dtype=np.uint8) for row in range(count)]


def write(path: Path, images: list[np.ndarray], store_format: st.StoreFormat, codec: st.Codec) -> None:
    with st.open_image_writer(path, SIZE_PX, store_format, codec, SHAPES) as writer:
        for row, image in enumerate(images):
            writer.append(image, f"key {row}", "sha256")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_images_of_differing_shapes_roundtrip(
    tmp_path: Path, store_format: st.StoreFormat, codec: st.Codec, count: int
) -> None:
    images = made_images(count)
    write(tmp_path / "images", images, store_format, codec)
    assert [file.name for file in tmp_path.iterdir()] == ["images"]
    with open(tmp_path / "images", "rb") as remote:
        for source in (str(tmp_path / "images"), remote):
            file = st.open_images(source, "images", group(store_format, codec))
            assert file.num_rows == count
            for row in reversed(range(count)):
                assert file.shape(row) == images[row].shape[:2]
                expected = (
                    decode(np.frombuffer(encode(images[row], codec), np.uint8), codec, file.shape(row))
                    if codec == "jpeg"
                    else images[row]
                )
                np.testing.assert_array_equal(file.pixels(row), expected)


def test_a_part_of_a_raw_image_is_a_view_of_the_file(tmp_path: Path, store_format: st.StoreFormat) -> None:
    write(tmp_path / "images", made_images(7), store_format, "raw")
    pixels = st.open_images(str(tmp_path / "images"), "images", group(store_format, "raw")).pixels(4)
    while isinstance(pixels.base, np.ndarray):
        pixels = pixels.base
    assert not pixels.flags.owndata


def test_a_shape_that_is_no_bucket_is_refused_and_leaves_nothing(tmp_path: Path, store_format: st.StoreFormat) -> None:
    images = [*made_images(2), np.zeros((SIZE_PX, SIZE_PX + 1, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"row 2: uint8 \(32, 33, 3\), not uint8 \(40, 24, 3\) or \(32, 32, 3\) or"):
        write(tmp_path / "images", images, store_format, "raw")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_files_of_buckets_and_of_squares_are_not_taken_for_each_other(
    tmp_path: Path, store_format: st.StoreFormat, codec: st.Codec
) -> None:
    write(tmp_path / "buckets", made_images(3), store_format, codec)
    with st.open_image_writer(tmp_path / "squares", SIZE_PX, store_format, codec) as writer:
        writer.append(np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8), "key", "sha256")
    with pytest.raises(st.StoreError, match="squares"):
        st.open_images(str(tmp_path / "squares"), "squares", group(store_format, codec))
    with pytest.raises(st.StoreError, match="buckets"):
        st.open_images(str(tmp_path / "buckets"), "buckets", group(store_format, codec, config={})).pixels(0)
    others = {"shapes": [[36, 28], [32, 32], [28, 36]]}
    with pytest.raises(st.StoreError, match=r"buckets: \(24, 40\) is no shape of group 'images-32'"):
        st.open_images(str(tmp_path / "buckets"), "buckets", group(store_format, codec, config=others))


@pytest.mark.parametrize(
    "shapes", [[], [[32, 32], [32, 32]], [[40, 24]], [[32, 32], [0, 4]], [[32, 32, 3]], [[32, 32], [40, 2.5]], 5]
)
def test_a_manifest_with_impossible_shapes_is_refused(shapes: object) -> None:
    with pytest.raises(ValueError, match="group 'images-32': "):
        group("parquet", "raw", config={"shapes": shapes})


def test_squares_have_no_shapes() -> None:
    square = group("parquet", "raw", config={})
    assert square.shapes == ()
    assert square.shape_of(640, 480) == (32, 32)
    assert group("parquet", "raw").shape_of(640, 400) == (24, 40)
    assert group("parquet", "raw").shape_of(0, 0) == (32, 32)


@pytest.mark.parametrize("codec", CODECS[:3])
def test_samples_of_a_store_have_images_of_their_buckets(
    tmp_path: Path, store_format: st.StoreFormat, codec: st.Codec
) -> None:
    made = make_store(tmp_path / "store", store_format=store_format, codec=codec, sizes=(16, 8), buckets=True)
    store = st.Store.open(made.path)
    assert store[0].images[16].shape == (12, 20, 3)
    assert store[1].images[8].shape == (10, 6, 3)
    for index, sample in enumerate(store):
        for size in (16, 8):
            np.testing.assert_array_equal(sample.images[size], made.images[size][index])
    report = st.verify_store(made.path)
    assert report.ok, report.problems


def test_verify_finds_an_image_of_another_bucket(tmp_path: Path, store_format: st.StoreFormat) -> None:
    made = make_store(tmp_path / "store", store_format=store_format, sizes=(16, 8), buckets=True)
    samples = st.read_samples(made.path / "samples/00001.parquet")
    path = made.path / st.shard_path("images-16", 1, store_format)
    with st.open_image_writer(path, 16, store_format, "raw", bucket_list(16)) as writer:
        for row, sample in enumerate(samples):
            shape = (20, 12) if row == 2 else bucket_list(16)[(2, 0)[row]]
            writer.append(np.zeros((*shape, 3), np.uint8), sample.key, sample.sha256)
    rewrite_manifest(made.path)
    (problem,) = st.verify_store(made.path).problems
    assert problem.message == "1 images have not the shape of their bucket, the first in row 2 ('001-002')"
