"""The orientation that img2dataset keeps only as text turns its images, once."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagen_core.store import Store
from stages.images import decode_rgb
from stages.images.exif_text import exif_with, orientation_in
from tests.runs import precompute

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def image(format: str = "PNG", orientation: int | None = None) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    Image.fromarray(PIXELS).save(buffer, format, exif=exif)
    return buffer.getvalue()


def turned(data: bytes, orientation: int | None) -> np.ndarray:
    return decode_rgb(data, max_pixels=10**6, orientation=orientation).pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_words_of_exifread_are_the_numbers_that_exif_has(orientation: int) -> None:
    import exifread

    text = str(exifread.process_file(io.BytesIO(image("JPEG", orientation)), details=False)["Image Orientation"])
    assert orientation_in(json.dumps({"Image Orientation": text})) == orientation
    assert orientation_in(exif_with(orientation)) == orientation


@pytest.mark.parametrize("exif", [None, "", "{}", "no json", "[1]", '{"Image Orientation": "0"}', 6, float("nan")])
def test_other_texts_have_no_orientation(exif: object) -> None:
    assert orientation_in(exif) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_known_orientation_turns_as_the_one_in_the_file(orientation: int) -> None:
    assert (turned(image(), orientation) == turned(image("PNG", orientation), None)).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_the_orientation_of_the_file_comes_first(format: str) -> None:
    assert (turned(image(format, 3), 6) == np.rot90(PIXELS, 2)).all()
    assert (turned(image(format, 1), 6) == PIXELS).all()


def test_tars_and_parquet_of_img2dataset_are_turned_and_kept_originals_as_well(tmp_path: Path) -> None:
    exif = exif_with(6)
    files = {"a.png": image(), "a.json": json.dumps({"exif": exif}).encode(), "a.txt": b"text"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"image": [image()], "caption": ["text"], "exif": [exif]}), tmp_path / "a.parquet")
    options = ("images.sizes_px=[20]", "keep_originals=true", "encoders=[]")
    precompute(tmp_path / "tar", "source.kind=webdataset", f"source.path={tmp_path}/a.tar", *options)
    precompute(tmp_path / "table", "source.kind=parquet", f"source.path={tmp_path}/a.parquet", *options)
    originals = f"source.path={tmp_path}/tar/staging/originals"
    precompute(tmp_path / "again", "source.kind=webdataset", originals, "source.caption_column=captions", *options)
    for run in ("tar", "table", "again"):
        assert (Store.open(tmp_path / run / "store")[0].images[20] == np.rot90(PIXELS, -1)).all(), run
    unused = "source.exif_column=null"
    precompute(tmp_path / "off", "source.kind=webdataset", f"source.path={tmp_path}/a.tar", *options, unused)
    assert (Store.open(tmp_path / "off" / "store")[0].images[20] == PIXELS).all()
