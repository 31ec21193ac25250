"""Every file of a folder is a sample, a counted drop, or ignored by a rule and counted."""

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import Store
from pipeline.errors import ConfigError
from stages.sources.folder import FolderConfig, FolderSource
from tests.images import plain_png
from tests.runs import precompute
from tests.stages.sources.reading import outcomes, read_originals


def folder_of(root: Path, files: Mapping[str, bytes | str]) -> str:
    for name, content in files.items():
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root / "data")


def source_of(root: Path, files: Mapping[str, bytes | str], **settings: object) -> FolderSource:
    return FolderConfig(path=folder_of(root, files), **settings).build()  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["jpg", "JFIF", "jpe", "apng", "pgm", "pbm", "pnm", "dib", "heic", "heif", "jxl"])
def test_an_image_of_any_suffix_is_a_row(tmp_path: Path, suffix: str) -> None:
    assert outcomes(source_of(tmp_path, {f"a.{suffix}": b"x", "a.txt": "one"})) == {f"a.{suffix}": ["one"]}


def test_what_is_no_image_is_ignored_by_a_rule_and_counted(tmp_path: Path) -> None:
    files = {
        "a.png": b"x",
        "a.txt": "one",
        "a.b.png": b"x",
        "a.b.caption": "two",
        "c.PNG": b"x",
        "orphan.txt": "three",
        "notes.md": "x",
        "more.MD": "x",
        "Makefile": "x",
        "sub/d.txt": "x",
        ".ipynb_checkpoints/a.png": b"x",
        ".git/config": "x",
        "sub/._a.png": b"x",
        ".DS_Store": b"x",
        "__MACOSX/a.png": b"x",
        "@eaDir/a.png/thumb.jpg": b"x",
        "Thumbs.db": b"x",
    }
    folder = source_of(tmp_path, files)
    for _ in range(2):
        assert outcomes(folder) == {"a.b.png": ["two"], "a.png": ["one"], "c.PNG": "empty_caption"}
        assert folder.ignored == {
            "caption files without an image": 2,
            ".md files": 2,
            "files without suffix": 1,
            "hidden": 4,
            "of the operating system": 3,
        }


def test_the_rules_for_suffixes_are_few_however_many_there_are(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {"a.png": b"x", **{f"x.{number:05d}": b"" for number in range(100)}})
    list(folder.parts())
    assert folder.ignored.total() == 100
    assert len(folder.ignored) <= 21


def test_a_link_to_nothing_is_a_missing_file(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {"a.png": b"x", "a.txt": "one"})
    (tmp_path / "data" / "b.png").symlink_to(tmp_path / "gone")
    assert outcomes(folder) == {"a.png": ["one"], "b.png": "missing_file"}


def metadata(rows: list[dict[str, object]], suffix: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_metadata_of_an_imagefolder_is_a_table(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "test"):
        rows: list[dict[str, object]] = [
            {"file_name": f"{i}.png", "text": f"{split} {i}", "number": str(i)} for i in range(3)
        ]
        metadata(rows, suffix, tmp_path / "data" / split / f"metadata.{suffix}")
    images = {f"{split}/{i}.png": b"x" for split in ("train", "test") for i in (0, 1, 7)}
    folder = source_of(tmp_path, {**images, "train/0.json": "{}"}, label_column="number")
    folder.check()
    assert outcomes(folder) == {
        "test/0.png": ["test 0"],
        "test/1.png": ["test 1"],
        "test/2.png": "missing_file",
        "train/0.png": ["train 0"],
        "train/1.png": ["train 1"],
        "train/2.png": "missing_file",
    }
    assert [original.annotations.get("label") for original in read_originals(folder)][:2] == ["0", "1"]
    assert folder.ignored == {"images that no row of the table names": 2, ".json files": 1}


def test_a_file_of_more_bytes_than_allowed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.sources.folder.MAX_FILE_BYTES", 1000)
    folder = source_of(tmp_path, {"a.png": b"x" * 1000, "a.txt": "a", "b.png": b"x" * 1001, "b.txt": "b"})
    assert outcomes(folder) == {"a.png": ["a"], "b.png": "too_large"}


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_metadata_does_not_decide_its_columns(tmp_path: Path, order: int) -> None:
    rows: list[dict[str, object]] = [{"file_name": "a.png"}, {"file_name": "b.png", "text": "two"}]
    metadata(rows[::order], "jsonl", tmp_path / "data" / "metadata.jsonl")
    folder = source_of(tmp_path, {"a.png": b"x", "b.png": b"x"})
    folder.check()
    assert outcomes(folder) == {"a.png": "empty_caption", "b.png": ["two"]}


def test_metadata_in_the_folder_itself_goes_before_that_of_subfolders(tmp_path: Path) -> None:
    metadata([{"file_name": "train/a.png", "caption": "root"}], "jsonl", tmp_path / "data" / "metadata.jsonl")
    metadata([{"file_name": "a.png", "caption": "sub"}], "jsonl", tmp_path / "data" / "train" / "metadata.jsonl")
    assert outcomes(source_of(tmp_path, {"train/a.png": b"x"})) == {"train/a.png": ["root"]}


def test_a_metadata_file_without_files_is_no_table_and_tables_can_be_left_out(tmp_path: Path) -> None:
    files = {"metadata.csv": "name,size\nx,1\n", "a.png": b"x", "a.txt": "one"}
    folder = source_of(tmp_path, files)
    assert outcomes(folder) == {"a.png": ["one"]}
    assert folder.fingerprint() == {"captions": ".txt beside each image"}
    metadata([{"file_name": "a.png", "text": "two"}], "jsonl", tmp_path / "data" / "metadata.jsonl")
    assert outcomes(source_of(tmp_path, {})) == {"a.png": ["two"]}
    assert outcomes(source_of(tmp_path, {}, use_tables=False)) == {"a.png": ["one"]}


def test_a_metadata_table_without_captions_is_refused_by_its_columns(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {"metadata.csv": "file_name,prompt\na.png,one\n", "a.png": b"x"})
    with pytest.raises(ConfigError, match=r"source.caption_column: .*metadata.csv has no column 'caption'; it has: f"):
        folder.check()


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    folder = source_of(tmp_path, {"a.png": b"x"})
    monkeypatch.setattr("stages.sources.tree.os.scandir", refuse)
    with pytest.raises(ConfigError, match=r"source.path: /.*data cannot be read: Permission denied; let this user"):
        folder.check()


def test_captions_that_may_not_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source_of(tmp_path, {"a.png": b"x"})
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr(folder.tree, "read", lambda choices: (denied for _ in choices))
    with pytest.raises(ConfigError, match=r"source.path: the captions of a.png cannot be read: Permission denied"):
        list(folder.shards(1))


def test_a_run_says_what_it_ignored(tmp_path: Path) -> None:
    files = {"a.png": plain_png(), "a.caption": "red", "b.heic": b"x", "b.txt": "?", "x.json": "{}"}
    path = folder_of(tmp_path, files)
    settings = ("source.kind=folder", f"source.path={path}", "images.sizes_px=[16]", "encoders=[]")
    summary = precompute(tmp_path / "run", *settings)
    assert summary["ignored"] == {".json files": 1}
    assert summary["tally"]["groups"]["samples"]["drops"] == {"not_an_image": 1}
    assert [sample.captions for sample in Store.open(tmp_path / "run" / "store")] == [["red"]]
