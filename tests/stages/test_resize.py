"""What the resize stage decides about rows, through whole runs on hand-made pictures."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_core.store import Store, verify_store
from pipeline.workflow import Summary
from tests.workflows.conftest import precompute


def png(side_px: int, level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Grey squares a, b, c, d of 40, 100, 100 and 100 px; the level is the place in the alphabet times 10."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place, (name, side) in enumerate({"a": 40, "b": 100, "c": 100, "d": 100}.items()):
        (folder / f"{name}.png").write_bytes(png(side, 10 * (place + 1)))
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


def run(tmp_path: Path, pictures: Path, sizes: str, *more: str) -> Summary:
    return precompute(
        tmp_path / "run", "source.kind=folder", f"source.path={pictures}", f"images.sizes_px={sizes}", *more
    )


def test_pictures_smaller_than_the_largest_size_are_dropped_or_upscaled_as_configured(
    pictures: Path, tmp_path: Path
) -> None:
    dropped = run(tmp_path, pictures, "[16,64]")
    assert dropped["tally"]["groups"]["samples"]["drops"] == {"too_small": 1}
    assert [s.key for s in Store.open(tmp_path / "run" / "store")] == ["b.png", "c.png", "d.png"]
    upscaled = precompute(
        tmp_path / "up",
        "source.kind=folder",
        f"source.path={pictures}",
        "images.sizes_px=[64]",
        "images.too_small=upscale",
    )
    assert upscaled["num_samples"] == 4
    assert (Store.open(tmp_path / "up" / "store")[0].images[64] == 10).all()


def test_a_size_added_later_excludes_rows_it_cannot_have_and_keeps_all_others_in_place(
    pictures: Path, tmp_path: Path
) -> None:
    run(tmp_path, pictures, "[16]")
    assert len(Store.open(tmp_path / "run" / "store")) == 4
    changed = pictures / "c.png"
    size = changed.stat().st_size
    changed.write_bytes(png(100, 77)[:-12].ljust(size - 12, b"\0") + changed.read_bytes()[-12:])
    assert changed.stat().st_size == size, "the same size: only the hash tells"
    summary = run(tmp_path, pictures, "[16,64]")
    drops = summary["tally"]["groups"]["images-64"]["drops"]
    assert drops["too_small"] == 1
    assert sum(drops.values()) == 2
    assert summary["num_samples"] == 2
    store = Store.open(tmp_path / "run" / "store")
    assert [(s.key, int(s.images[16][0, 0, 0]), int(s.images[64][0, 0, 0])) for s in store] == [
        ("b.png", 20, 20),
        ("d.png", 40, 40),
    ]
    assert verify_store(tmp_path / "run" / "store").ok
    listed = (tmp_path / "run" / "quarantine" / "images-64" / "00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in listed] == ["a.png", "c.png"]


def test_kept_originals_are_not_fetched_again(pictures: Path, tmp_path: Path) -> None:
    run(tmp_path, pictures, "[16]", "keep_originals=true")
    tar = tmp_path / "run" / "staging" / "originals" / "00000.tar"
    assert tar.is_file()
    for picture in pictures.glob("*.png"):
        size = picture.stat().st_size
        picture.write_bytes(b"\0" * size)
    run(tmp_path, pictures, "[16,32]", "keep_originals=true")
    store = Store.open(tmp_path / "run" / "store")
    assert [int(s.images[32].max()) for s in store] == [10, 20, 30, 40]


def test_a_folder_of_the_kept_originals_is_a_webdataset_source(pictures: Path, tmp_path: Path) -> None:
    run(tmp_path, pictures, "[16]", "keep_originals=true")
    again = precompute(
        tmp_path / "again",
        "source.kind=webdataset",
        f"source.path={tmp_path / 'run' / 'staging' / 'originals'}",
        "source.caption_column=captions",
        "images.sizes_px=[16]",
    )
    assert again["num_samples"] == 4
    first, second = Store.open(tmp_path / "run" / "store"), Store.open(tmp_path / "again" / "store")
    for a, b in zip(first, second, strict=True):
        assert (a.captions, a.sha256) == (b.captions, b.sha256)
        assert np.array_equal(a.images[16], b.images[16])
