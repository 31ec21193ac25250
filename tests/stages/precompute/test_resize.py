"""What the resize stage decides about rows, through whole runs on hand-made images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagen_core.store import Store, verify_store
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.options import Summary
from stages.images import Decoded, decode_rgb
from stages.store_tools.inspect import inspect_command
from stages.store_tools.report import report_command
from tests.runs import precompute


def png(side_px: int, level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Grey squares a, b, c, d of 40, 100, 100 and 100 px; the level is the place in the alphabet times 10."""
    folder = tmp_path / "images"
    folder.mkdir()
    for place, (name, side) in enumerate({"a": 40, "b": 100, "c": 100, "d": 100}.items()):
        (folder / f"{name}.png").write_bytes(png(side, 10 * (place + 1)))
        (folder / f"{name}.txt").write_text(f"image {name}")
    return folder


def run(tmp_path: Path, images: Path, sizes: str, *more: str) -> Summary:
    return precompute(
        tmp_path / "run", "source.kind=folder", f"source.path={images}", f"images.sizes_px={sizes}", *more
    )


def test_images_smaller_than_the_largest_size_are_dropped_or_upscaled_as_configured(
    images: Path, tmp_path: Path
) -> None:
    dropped = run(tmp_path, images, "[16,64]")
    assert dropped["tally"]["groups"]["samples"]["drops"] == {"too_small": 1}
    assert [s.key for s in Store.open(tmp_path / "run" / "store")] == ["b.png", "c.png", "d.png"]
    upscaled = precompute(
        tmp_path / "up",
        "source.kind=folder",
        f"source.path={images}",
        "images.sizes_px=[64]",
        "filters=[{kind: too_small, action: upscale}]",
    )
    assert upscaled["num_samples"] == 4
    assert (Store.open(tmp_path / "up" / "store")[0].images[64] == 10).all()


def test_a_size_added_later_excludes_rows_it_cannot_have_and_keeps_all_others_in_place(
    images: Path, tmp_path: Path
) -> None:
    run(tmp_path, images, "[16]")
    assert len(Store.open(tmp_path / "run" / "store")) == 4
    changed = images / "c.png"
    size = changed.stat().st_size
    changed.write_bytes(png(100, 77)[:-12].ljust(size - 12, b"\0") + changed.read_bytes()[-12:])
    assert changed.stat().st_size == size, "the same size: only the hash tells"
    summary = run(tmp_path, images, "[16,64]")
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


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_an_image_for_which_memory_does_not_suffice_is_a_drop_and_not_the_shard(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def short_of_memory(data: bytes, **options: Any) -> Decoded:
        if data == png(100, 30):
            raise error
        return decode_rgb(data, **options)

    monkeypatch.setattr("stages.precompute.resize.decode_rgb", short_of_memory)
    summary = run(tmp_path, images, "[16]", "encoders=[]")
    assert summary["tally"]["groups"]["samples"]["drops"] == {"out_of_memory": 1}
    assert [s.key for s in Store.open(tmp_path / "run" / "store")] == ["a.png", "b.png", "d.png"]


def test_kept_originals_are_not_fetched_again(images: Path, tmp_path: Path) -> None:
    run(tmp_path, images, "[16]", "keep_originals=true")
    tar = tmp_path / "run" / "staging" / "originals" / "00000.tar"
    assert tar.is_file()
    for image in images.glob("*.png"):
        size = image.stat().st_size
        image.write_bytes(b"\0" * size)
    run(tmp_path, images, "[16,32]", "keep_originals=true")
    store = Store.open(tmp_path / "run" / "store")
    assert [int(s.images[32].max()) for s in store] == [10, 20, 30, 40]


def test_a_folder_of_the_kept_originals_is_a_webdataset_source(images: Path, tmp_path: Path) -> None:
    run(tmp_path, images, "[16]", "keep_originals=true")
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


@pytest.mark.parametrize("store_format", ["parquet", "hdf5"])
def test_a_codec_by_size_stores_the_pixels_of_raw_ones_and_shows_in_every_command(
    images: Path, tmp_path: Path, store_format: str
) -> None:
    run(tmp_path / "raw", images, "[16,32]", f"store.format={store_format}")
    run(tmp_path / "coded", images, "[16,32]", f"store.format={store_format}", "images.codec={32: webp}")
    raw, coded = (Store.open(tmp_path / name / "run" / "store") for name in ("raw", "coded"))
    assert {size: group.codec for size, group in coded.manifest.images.items()} == {16: "raw", 32: "webp"}
    assert coded.manifest.images[32].config == {"filter": "bicubic", "lossless": True, "quality": 20, "method": 0}
    assert coded.manifest.file("images-16", 0) == raw.manifest.file("images-16", 0)
    for a, b in zip(raw, coded, strict=True):
        assert np.array_equal(a.images[32], b.images[32])
    assert verify_store(tmp_path / "coded" / "run" / "store").ok
    result, lines, _ = inspect_command(tmp_path / "coded" / "run")
    assert result["groups"]["images-32"]["codec"] == "webp"  # type: ignore[index]
    assert any(f"32 px, webp, {store_format}" in line for line in lines)
    assert report_command(tmp_path / "coded" / "run")[2] == 0


def test_another_codec_is_refused_with_a_diff_and_rebuilt_alone_on_restart(images: Path, tmp_path: Path) -> None:
    run(tmp_path, images, "[16,32]", "images.codec=png")
    kept = (tmp_path / "run" / "store" / "images-16" / "00000.parquet").stat()
    with pytest.raises(StaleOutputError, match=r"(?s)images-32.*codec.*png.*jpeg"):
        run(tmp_path, images, "[16,32]", "images.codec={16: png, 32: jpeg}")
    precompute(
        tmp_path / "run",
        "source.kind=folder",
        f"source.path={images}",
        "images.sizes_px=[16,32]",
        "images.codec={16: png, 32: jpeg}",
        restart=True,
    )
    assert (tmp_path / "run" / "store" / "images-16" / "00000.parquet").stat().st_mtime_ns == kept.st_mtime_ns
    store = Store.open(tmp_path / "run" / "store")
    assert [group.codec for group in store.manifest.images.values()] == ["png", "jpeg"]
    assert [int(s.images[32].max()) for s in store] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("jpg", "images.codec: codec 'jpg': use one of raw, png, webp, jpeg"),
        ("{16: jpg}", "images.codec: codec 'jpg': use one of raw, png, webp, jpeg"),
        ("{99: png}", r"images.codec: names the sizes 99, but sizes_px is \[16\]"),
    ],
)
def test_a_codec_that_there_is_not_is_refused(images: Path, tmp_path: Path, codec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, images, "[16]", f"images.codec={codec}")
