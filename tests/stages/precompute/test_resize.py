"""What the resize stage decides about rows, through whole runs on hand-made images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagen_core.store import Store, crop_box, verify_store
from pipeline.config import load_config
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.options import Summary
from pipeline.storage.run_folder import RunFolder
from stages.browse.report import report_command
from stages.images import Decoded, decode_rgb
from stages.precompute.resize import ResizeStage
from stages.store_tools.inspect import inspect_command
from stages.store_tools.remove import remove_command
from tests.runs import precompute
from workflows.precompute import Precompute, PrecomputeConfig


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


@pytest.mark.slow
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


SHAPES_32 = [(40, 24), (32, 32), (24, 40)]
"""Height and width of the buckets of 32 px."""


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Noise of several shapes: wide, tall, square, 10:1, and too small for 64 px in its height alone."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    sizes = {"a": (300, 200), "b": (200, 300), "c": (210, 200), "d": (1000, 100), "e": (150, 40)}
    for name, (width, height) in sizes.items():
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"scene {name}")
    return folder


BUCKETS = "images.aspect=buckets"


@pytest.mark.parametrize(("store_format", "codec"), [("parquet", "raw"), ("hdf5", "png")])
def test_images_of_buckets_are_cropped_least_and_all_sizes_show_the_same_part(
    scenes: Path, tmp_path: Path, store_format: str, codec: str
) -> None:
    summary = run(tmp_path, scenes, "[32,64]", BUCKETS, f"store.format={store_format}", f"images.codec={codec}")
    assert summary["tally"]["groups"]["samples"]["drops"] == {"too_small": 1}, "e has 40 px, its bucket 48"
    store = Store.open(tmp_path / "run" / "store")
    assert store.manifest.images[64].config["shapes"] == [[2 * h, 2 * w] for h, w in SHAPES_32]
    expected = {"a.png": (24, 40), "b.png": (40, 24), "c.png": (32, 32), "d.png": (24, 40)}
    for sample in store:
        height, width = expected[sample.key]
        with Image.open(scenes / sample.key) as original:
            crop = original.crop(crop_box(sample.width, sample.height, (height, width)))
        for size, factor in ((32, 1), (64, 2)):
            assert sample.images[size].shape == (height * factor, width * factor, 3)
            resized = crop.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
            assert np.abs(sample.images[size].astype(int) - np.asarray(resized).astype(int)).max() <= 1
    assert verify_store(tmp_path / "run" / "store").ok


def test_summary_report_and_inspect_say_what_is_cut_off_and_how_many_images_each_bucket_has(
    scenes: Path, tmp_path: Path
) -> None:
    run(tmp_path, scenes, "[32]", BUCKETS, "duplicates=report")
    folder = tmp_path / "run"
    workflow = Precompute(load_config(PrecomputeConfig, None, ["images.sizes_px=[32]", BUCKETS]))
    line = dict(workflow.next_steps(RunFolder(str(folder))))["crops"]
    assert line.endswith("; 24x40 20.0%, 32x32 20.0%, 40x24 60.0%")
    result, lines, _ = inspect_command(str(folder))
    assert result["crops"]["histogram"] == {"24x40": 1, "32x32": 1, "40x24": 3}  # type: ignore[index]
    assert f"  crops: {line}" in lines
    assert any("32 px, raw, parquet, 3 buckets" in line for line in lines)
    report, lines, _ = report_command(str(folder))
    assert f"crops  {line}" in lines
    assert report["crops"]["images"] == 5  # type: ignore[index]
    page = (folder / "report" / "index.html").read_text()
    assert 'width="40" height="24" alt="scene a, 40 x 24 px"' in page
    assert "<td>40x24</td>" in page


@pytest.mark.parametrize(("store_format", "codec"), [("parquet", "raw"), ("hdf5", "png")])
def test_removed_samples_of_buckets_are_erased_and_counted_no_more(
    scenes: Path, tmp_path: Path, store_format: str, codec: str
) -> None:
    run(tmp_path, scenes, "[32]", BUCKETS, f"store.format={store_format}", f"images.codec={codec}")
    folder, kept = tmp_path / "run", Store.open(tmp_path / "run" / "store")[2].images[32]
    remove_command(str(folder), key=["a.png"], compact_files=True, grace_s=0)
    store = Store.open(folder / "store")
    assert [sample.key for sample in store] == ["b.png", "c.png", "d.png", "e.png"]
    np.testing.assert_array_equal(store[1].images[32], kept)
    assert store.shard(0).images[32].shape(0) == (24, 40), "the order of a loader depends on its bucket"
    assert not store.shard(0).images[32].pixels(0).any()
    assert verify_store(folder / "store").ok
    crops = inspect_command(str(folder))[0]["crops"]
    assert crops["histogram"] == {"24x40": 1, "32x32": 1, "40x24": 2}  # type: ignore[index]


def test_a_larger_size_added_later_has_the_same_buckets_and_blanks_of_their_shape(
    scenes: Path, tmp_path: Path
) -> None:
    run(tmp_path, scenes, "[32]", BUCKETS)
    assert len(Store.open(tmp_path / "run" / "store")) == 5
    run(tmp_path, scenes, "[32,64]", BUCKETS)
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.key for sample in store] == ["a.png", "b.png", "c.png", "d.png"]
    files = store.shard(0)
    assert [files.images[64].shape(row) for row in range(5)] == [(48, 80), (80, 48), (64, 64), (48, 80), (48, 80)]
    assert not files.images[64].pixels(4).any()
    assert verify_store(tmp_path / "run" / "store").ok


def test_buckets_of_another_list_are_refused_with_a_diff(scenes: Path, tmp_path: Path) -> None:
    """Squares and buckets, another ratio, or a smaller size whose list does not fit the larger images."""
    run(tmp_path, scenes, "[64]", BUCKETS)
    for more in (["[64]"], ["[64]", BUCKETS, "images.max_aspect_ratio=1.5"], ["[32,64]", BUCKETS]):
        with pytest.raises(StaleOutputError, match=r"(?s)images-64.*shapes"):
            run(tmp_path, scenes, *more)


def test_a_base_size_keeps_the_list_of_a_smaller_size_that_comes_later(scenes: Path, tmp_path: Path) -> None:
    run(tmp_path, scenes, "[64]", BUCKETS, "images.aspect_base_px=32")
    before = Store.open(tmp_path / "run" / "store").manifest.file("images-64", 0)
    run(tmp_path, scenes, "[32,64]", BUCKETS)
    store = Store.open(tmp_path / "run" / "store")
    assert store.manifest.file("images-64", 0) == before
    assert [image.shape for image in store[0].images.values()] == [(24, 40, 3), (48, 80, 3)]


def test_squares_are_not_changed_by_the_settings_of_buckets(images: Path, tmp_path: Path) -> None:
    run(tmp_path, images, "[16]", "images.max_aspect_ratio=3")
    group = Store.open(tmp_path / "run" / "store").manifest.images[16]
    assert group.config == {"filter": "bicubic"}
    assert group.shapes == ()


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        ("[60]", (), "images: buckets need a smallest size that is a multiple of 8"),
        ("[64,100]", (), "images: images of 100 px cannot have the shapes of those of 64 px"),
        ("[16]", (), "images: aspect: buckets of 16 px with max_aspect_ratio 2 have no shape but the square"),
        ("[64]", ("images.max_aspect_ratio=1.1",), "have no shape but the square"),
        ("[64]", ("images.max_aspect_ratio=0.5",), "images.max_aspect_ratio"),
        (
            "[64]",
            ("images.aspect_base_px=128",),
            "images: aspect_base_px is 128, but sizes_px has 64; it may not be larger",
        ),
        ("[64]", ("images.aspect=square", "images.aspect_base_px=64"), "images: aspect_base_px is of aspect: buckets"),
    ],
)
def test_lists_of_buckets_that_cannot_be_are_refused(
    images: Path, tmp_path: Path, sizes: str, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, images, sizes, BUCKETS, *more)


def test_a_run_whose_images_are_all_dropped_has_no_crops(scenes: Path, tmp_path: Path) -> None:
    run(tmp_path, scenes, "[2048]", BUCKETS, "images.aspect_base_px=64", "max_drop_fraction=1")
    result, lines, _ = inspect_command(str(tmp_path / "run"))
    assert "crops" not in result
    assert not any("crops" in line for line in lines)
    assert verify_store(tmp_path / "run" / "store").ok


@pytest.mark.parametrize("store_format", ["parquet", "hdf5"])
def test_bytes_of_images_of_buckets_are_planned(scenes: Path, tmp_path: Path, store_format: str) -> None:
    run(tmp_path, scenes, "[32]", BUCKETS, f"store.format={store_format}")
    config = load_config(PrecomputeConfig, None, ["images.sizes_px=[32]", BUCKETS])
    planned = ResizeStage(config.images, config.store.format).estimate_bytes("images-32", 5)
    assert planned is not None
    found = Store.open(tmp_path / "run" / "store").manifest.file("images-32", 0)
    assert found is not None
    assert planned == pytest.approx(found.bytes, rel=0.1)
