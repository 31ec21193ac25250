"""Expected hashes over HTTP: exactly the images whose bytes are not those of the list are dropped."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagen_core.store import Store, verify_store
from tests.image_server import body, serve
from tests.runs import precompute

IMAGES, EVERY = 1000, 7  # 14 % are others by now
SETTINGS = ("images.sizes_px=[8]", "encoders=[]", "shard_size=250", "source.download.allow_private_addresses=true")


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), [number % 256, number // 256, 0], np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("column", ["sha256", "md5"])
def test_of_1000_images_exactly_those_with_other_bytes_are_dropped(column: str, tmp_path: Path) -> None:
    images = [png(number) for number in range(IMAGES)]
    changed = set(range(0, IMAGES, EVERY))
    listed = [png(number + IMAGES) if number in changed else image for number, image in enumerate(images)]
    with serve({f"/{number}.png": body(image) for number, image in enumerate(images)}) as server:
        rows = {
            "url": [server.url(f"/{number}.png") for number in range(IMAGES)],
            "caption": [f"image {number}" for number in range(IMAGES)],
            "digest": [hashlib.new(column, image).hexdigest() for image in listed],
        }
        pq.write_table(pa.table(rows), tmp_path / "l.parquet")
        source = ("source.kind=urls", f"source.path={tmp_path / 'l.parquet'}", f"source.{column}_column=digest")
        summary = precompute(tmp_path / "run", *source, *SETTINGS, "max_drop_fraction=0.2")
    assert summary["tally"]["groups"]["samples"]["drops"] == {"hash_mismatch": len(changed)}
    kept = [sample.captions[0] for sample in Store.open(tmp_path / "run" / "store")]
    assert kept == [f"image {number}" for number in range(IMAGES) if number not in changed]
    report = verify_store(tmp_path / "run" / "store")
    assert (report.ok, report.unaccounted) == (True, 0)
