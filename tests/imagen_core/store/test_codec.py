"""Encoded images: the pixels of raw ones in fewer bytes, in either format."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from imagen_core import store as st
from imagen_core.store.codec import decode, encode
from imagen_core.store.files.images import ImageFile, open_images
from tests.imagen_core.store.handmade_store import Made
from tests.imagen_core.store.verification.test_verify import rewrite_manifest

Make = Callable[..., Made]
ENCODED: list[st.Codec] = ["png", "webp", "jpeg"]
LOSSLESS: list[st.Codec] = ["png", "webp"]
SIZE_PX = 64


def smooth(count: int, size_px: int = SIZE_PX) -> np.ndarray:
    """Images of soft waves with a hard edge and some grain: uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:size_px, :size_px] / size_px
    waves = [128 + 90 * np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 2, (3 * count, 3))]
    images = np.stack(waves).reshape(count, 3, size_px, size_px).transpose(0, 2, 3, 1)
    images[:, size_px // 3 : size_px // 2, size_px // 4 :] = (250, 20, 60)
    return (images + rng.normal(0, 2, images.shape)).clip(0, 255).round().astype(np.uint8)


def write(path: Path, images: np.ndarray, store_format: st.StoreFormat, codec: st.Codec) -> None:
    with st.open_image_writer(path, images.shape[1], store_format, codec) as writer:
        for image in images:
            writer.append(image, "key", "sha256")


def opened(source: Any, store_format: st.StoreFormat, codec: st.Codec, size_px: int = SIZE_PX) -> ImageFile:
    return open_images(source, "images", st.ImagesGroup(f"images-{size_px}", size_px, store_format, codec))


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_lossless_codecs_keep_every_pixel(
    tmp_path: Path, store_format: st.StoreFormat, codec: st.Codec, count: int
) -> None:
    images = smooth(max(1, count))[:count]
    images[1::2] = np.random.default_rng(1).integers(0, 256, images[1::2].shape)
    write(tmp_path / "images", images, store_format, codec)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    with open(tmp_path / "images", "rb") as remote:
        for source in (str(tmp_path / "images"), remote):
            file = opened(source, store_format, codec)
            assert file.num_rows == count
            for row in reversed(range(count)):
                np.testing.assert_array_equal(file.pixels(row), images[row])


def test_jpeg_stays_near_the_pixels_and_keeps_its_colours_sharp(tmp_path: Path, store_format: st.StoreFormat) -> None:
    images = smooth(6)
    write(tmp_path / "images", images, store_format, "jpeg")
    file = opened(str(tmp_path / "images"), store_format, "jpeg")
    errors = np.stack([file.pixels(row) for row in range(6)]).astype(int) - images
    assert np.abs(errors).mean() < 2
    assert 10 * np.log10(255**2 / (errors**2).mean()) > 40  # dB; with halved chroma 30


def test_chroma_is_not_halved_in_jpeg() -> None:
    with Image.open(io.BytesIO(encode(smooth(1)[0], "jpeg"))) as image:
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("codec", ENCODED)
def test_encoded_files_are_their_images_and_little_more(
    tmp_path: Path, store_format: st.StoreFormat, codec: st.Codec
) -> None:
    images = smooth(50)
    write(tmp_path / "images", images, store_format, codec)
    payload = sum(len(encode(image, codec)) for image in images)
    size = (tmp_path / "images").stat().st_size
    assert payload < images.nbytes * 0.8
    assert payload < size < payload + 16 * len(images) + 2048


@pytest.mark.parametrize("codec", ENCODED)
def test_the_same_images_make_the_same_bytes(tmp_path: Path, store_format: st.StoreFormat, codec: st.Codec) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, smooth(5), store_format, codec)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("codec", LOSSLESS)
def test_a_store_of_encoded_images_reads_and_verifies_like_a_raw_one(
    make: Make, store_format: st.StoreFormat, codec: st.Codec
) -> None:
    raw = st.Store.open(make("raw", store_format=store_format, excluded={1: [0]}).path)
    made = make("encoded", store_format=store_format, codec=codec, excluded={1: [0]})
    store = st.Store.open(made.path)
    for a, b in zip(raw, store, strict=True):
        for size in (4, 8):
            np.testing.assert_array_equal(a.images[size], b.images[size])
            b.images[size][:] = 0  # is the caller's own
    batches = [s.loader(batch_size=5, images=[4, 8], text="t5") for s in (raw, store)]
    for a, b in zip(*batches, strict=True):
        assert a["keys"] == b["keys"]
        assert all(a["images"][size].equal(b["images"][size]) for size in (4, 8))
    assert st.verify_store(made.path).problems == []
    assert store.manifest.images[8].config == st.codec_settings(codec)
    url = f"memory://codec-{store_format}-{codec}"
    remote = fsspec.filesystem("memory")
    for path in made.path.rglob("*.*"):
        remote.pipe(f"{url}/{path.relative_to(made.path).as_posix()}", path.read_bytes())
    np.testing.assert_array_equal(st.Store.open(url)[7].images[8], raw[7].images[8])
    remote.rm(url, recursive=True)


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("damage", ["truncated", "another size", "gray", "noise"])
def test_an_image_that_does_not_decode_is_named_by_verify_and_reader(
    make: Make, store_format: st.StoreFormat, codec: st.Codec, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum is right here: only decoding tells."""
    made = make(store_format=store_format, codec=codec, shard_rows=(3,), sizes=(8,))
    (path,) = (made.path / "images-8").glob("00000.*")
    good = smooth(3, 8)
    image = encode(good[1], codec)
    buffer = io.BytesIO()
    Image.new("L" if damage == "gray" and codec != "webp" else "RGB", (8, 9)).save(buffer, codec)
    wrong = {"truncated": image[: len(image) // 2], "noise": bytes(range(200))}.get(damage, buffer.getvalue())
    stored = iter([encode(good[0], codec), wrong, image])
    with monkeypatch.context() as patch:
        patch.setattr("imagen_core.store.files.images.encode", lambda pixels, codec: next(stored))
        write(path, good, store_format, codec)
    rewrite_manifest(made.path, lambda shards: None)
    (problem,) = st.verify_store(made.path).problems
    assert problem.file.startswith("images-8/00000.")
    assert f"row 1: not readable as {codec}" in problem.message
    with pytest.raises(st.StoreError, match=f"row 1: not readable as {codec}"):
        st.Store.open(made.path)[1]


@pytest.mark.parametrize(("written", "said"), [("png", "raw"), ("raw", "png")])
def test_a_file_of_another_codec_than_the_manifest_says_is_refused(
    tmp_path: Path, store_format: st.StoreFormat, written: st.Codec, said: st.Codec
) -> None:
    write(tmp_path / "images", smooth(2), store_format, written)
    with pytest.raises(st.StoreError, match="images: not readable as"):
        opened(str(tmp_path / "images"), store_format, said)


def test_an_unknown_codec_is_refused_with_the_available_ones(tmp_path: Path, store_format: st.StoreFormat) -> None:
    with pytest.raises(ValueError, match="codec 'jpg': use one of raw, png, webp, jpeg"):
        write(tmp_path / "images", smooth(1), store_format, "jpg")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ENCODED)
def test_what_is_encoded_is_decoded_alone(codec: st.Codec) -> None:
    (image,) = smooth(1)
    data = np.frombuffer(encode(image, codec), np.uint8)
    other = next(name for name in ENCODED if name != codec)
    assert decode(data, codec, (SIZE_PX, SIZE_PX)).shape == (SIZE_PX, SIZE_PX, 3)
    with pytest.raises(ValueError, match="cannot identify"):
        decode(data, other, (SIZE_PX, SIZE_PX))
