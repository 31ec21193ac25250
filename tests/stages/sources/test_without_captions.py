"""Samples without captions: of every kind of source if it says so, and wherever a row has a class."""

import base64
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import Store
from pipeline.errors import ConfigError
from stages.sources.folder import FolderConfig
from stages.sources.huggingface import HuggingfaceConfig
from stages.sources.parquet import ParquetConfig
from stages.sources.tars import WebdatasetConfig
from stages.sources.tsv import TsvConfig
from tests.images import plain_png
from tests.runs import precompute
from tests.stages.sources.fetching import all_fetched

IMAGE = b"an image"


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_sources(root: Path) -> None:
    """One image per source, some of them with a caption that is not to be read."""
    write_tar(root / "a.tar", {"0.jpg": IMAGE, "0.txt": b"not read", "1.jpg": IMAGE})
    (root / "loose").mkdir()
    (root / "loose" / "a.png").write_bytes(IMAGE)
    (root / "loose" / "a.txt").write_text("not read")
    (root / "table").mkdir()
    (root / "table" / "a.png").write_bytes(IMAGE)
    (root / "table" / "captions.csv").write_text("file\na.png\n")
    pq.write_table(pa.table({"image": pa.array([IMAGE], pa.binary())}), root / "a.parquet")
    (root / "a.tsv").write_bytes(b"0\t" + base64.b64encode(IMAGE) + b"\n")


@pytest.mark.parametrize(
    ("name", "config", "rows"),
    [
        ("a.tar", WebdatasetConfig(caption_column=None), 2),
        ("loose", FolderConfig(caption_column=None), 1),
        ("table", FolderConfig(caption_column=None), 1),
        ("a.parquet", ParquetConfig(caption_column=None), 1),
        ("a.tsv", TsvConfig(caption_field=None, image_field=2), 1),
    ],
)
def test_every_source_can_be_read_without_captions(tmp_path: Path, name: str, config: FolderConfig, rows: int) -> None:
    write_sources(tmp_path)
    source = config.model_copy(update={"path": str(tmp_path / name)}).build()
    found = all_fetched(source, tmp_path / "scratch")
    assert [(row.captions, row.data, row.reason) for row in found] == [(("",), IMAGE, None)] * rows
    (shard,) = source.shards(10)
    assert source.captions(shard) == [("",)] * rows


def test_a_dataset_can_be_read_without_captions(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [{"bytes": IMAGE}]}, features=features).save_to_disk(tmp_path / "data")
    source = HuggingfaceConfig(path=str(tmp_path / "data"), caption_column=None).build()
    (row,) = all_fetched(source, tmp_path / "scratch")
    assert (row.captions, row.data, row.reason) == (("",), IMAGE, None)
    (shard,) = source.shards(10)
    assert source.captions(shard) == [("",)]


def test_a_sample_of_a_tar_that_has_a_class_needs_no_caption(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "0.cls": b"7",
            "0.jpg": IMAGE,
            "1.jpg": IMAGE,
            "2.cls": b"-1",
            "2.jpg": IMAGE,
            "3.cls": b"8",
            "3.jpg": IMAGE,
            "3.txt": b"with a caption",
            "4.cls": b"many",
            "4.jpg": IMAGE,
        },
    )
    source = WebdatasetConfig(path=str(tmp_path / "a.tar"), label_column="cls").build()
    found = [(row.captions, row.reason) for row in all_fetched(source, tmp_path / "scratch")]
    assert found == [
        (("",), None),
        ((), "empty_caption"),
        ((), "empty_caption"),
        (("with a caption",), None),
        (("",), None),  # the label is a drop of its own
    ]


def test_the_documented_command_for_classes_makes_samples_of_tars_of_images_and_classes(tmp_path: Path) -> None:
    images = {f"{number:06d}": plain_png() for number in range(6)}
    members = [(f"{key}.cls", str(i).encode()) for i, key in enumerate(images)]
    members += [(f"{key}.jpg", data) for key, data in images.items()]
    write_tar(tmp_path / "0.tar", dict(sorted(members)))
    settings = ("source.kind=webdataset", f"source.path={tmp_path / '0.tar'}", "source.label_column=cls")
    precompute(tmp_path / "run", *settings, "images.sizes_px=[16]", "encoders=[]")
    samples = list(Store.open(tmp_path / "run" / "store"))
    assert [(sample.label, sample.captions) for sample in samples] == [(i, [""]) for i in range(6)]


def test_a_table_without_the_caption_column_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("file,label\na.png,1\n")
    with pytest.raises(ConfigError, match="no column 'caption'; it has: file, label; null if there are no captions"):
        FolderConfig(path=str(tmp_path), label_column="label").build().check()


@pytest.mark.parametrize("caption", [None, "", " ", []])
def test_a_row_of_a_table_that_has_a_class_needs_no_caption(tmp_path: Path, caption: object) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    (tmp_path / "b.png").write_bytes(IMAGE)
    rows = [{"file": "a.png", "caption": caption, "label": 0}, {"file": "b.png", "caption": caption, "label": None}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FolderConfig(path=str(tmp_path), label_column="label").build()
    first, second = all_fetched(source, tmp_path / "scratch")
    assert (first.captions, first.data, first.reason) == (("",), IMAGE, None)
    assert second.reason == "empty_caption"
    assert all_fetched(FolderConfig(path=str(tmp_path)).build(), tmp_path / "again")[0].reason == "empty_caption"


def test_cells_of_a_dataset_that_are_not_text_are_refused_or_dropped(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "sentences": datasets.List({"raw": datasets.Value("string")}),
            "text": datasets.Value("binary"),
        }
    )
    row = {"image": {"bytes": IMAGE}, "label": 1, "sentences": [{"raw": "a"}, {"raw": "b"}], "text": b"in bytes"}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "data")

    def read(column: str) -> list[object]:
        source = HuggingfaceConfig(path=str(tmp_path / "data"), caption_column=column).build()
        return [each.reason or each.captions for each in all_fetched(source, tmp_path / column)]

    assert read("text") == [("in bytes",)]
    assert read("sentences.raw") == [("a", "b")]
    with pytest.raises(ConfigError, match=r"source.caption_column: .*column 'label' is of type int64"):
        read("label")
