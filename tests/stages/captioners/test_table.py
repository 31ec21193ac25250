"""`kind: table`: captions by the samples' keys."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, MachineError
from stages.captioners.table import CaptionTable, TableCaptionerConfig

ROWS = {"a": "one", "b": "two, three", "c/d.png": 'a "quoted" word', "7": "seven"}


def write(path: Path, rows: dict[str, Any], caption: str = "caption") -> Path:
    """The rows as whatever the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"key": list(rows), caption: list(rows.values())}), path, row_group_size=2)
        return path
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        text = "".join(json.dumps({caption: value, "key": key}) + "\n" for key, value in rows.items())
    elif path.suffix == ".tsv":
        text = "\n".join([f"key\t{caption}", *(f"{key}\t{value}" for key, value in rows.items())])
    else:
        quoted = (f'"{value}"' for value in (value.replace('"', '""') for value in rows.values()))
        text = "\n".join([f"{caption},key", *(f"{value},{key}" for value, key in zip(quoted, rows, strict=True))])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def table(path: Path | str, **settings: Any) -> TableCaptionerConfig:
    return TableCaptionerConfig.model_validate({"name": "t", "kind": "table", "path": str(path), **settings})


def found(path: Path, keys: list[str], **settings: Any) -> list[Any]:
    config = table(path, **settings)
    config.check()
    return CaptionTable(config).captions(keys)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.parquet", "t.jsonl.gz"])
def test_captions_are_found_by_key_in_every_format(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    assert found(path, [*reversed(ROWS), "absent"]) == [
        *(((caption,), None) for caption in reversed(ROWS.values())),
        ((), ("missing_key", "")),
    ]
    assert CaptionTable(table(path)).num_rows == len(ROWS)


def test_lists_paths_and_numbers_are_read_as_in_sources(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": 7, "made": {"texts": [" one ", "two", "one"]}}\n{"id": 8, "made": {"texts": []}}\n')
    keys = {"key_column": "id", "caption_column": "made.texts"}
    assert found(path, ["7", "8"], **keys) == [(("one", "two"), None), ((), ("empty_caption", ""))]


def test_a_cell_that_is_no_caption_has_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    cells = {"null": None, "empty": " \t", "number": 3, "long": "x" * 100_001, "not utf-8": "\ud800", "good": "a"}
    path.write_text("".join(json.dumps({"key": key, "caption": cell}) + "\n" for key, cell in cells.items()))
    assert [problem and problem[0] for _, problem in found(path, list(cells))] == [
        *("empty_caption", "empty_caption", "unsupported_type", "caption_too_long", "invalid_caption", None)
    ]


def test_a_folder_of_tables_is_one_table(tmp_path: Path) -> None:
    for number, (key, caption) in enumerate(ROWS.items()):
        write(tmp_path / f"{number}.jsonl", {key: caption})
    (tmp_path / "notes.md").write_text("no table")
    expected = [((caption,), None) for caption in ROWS.values()]
    assert found(tmp_path, list(ROWS)) == expected
    assert CaptionTable(table(f"{tmp_path}/[01].jsonl")).num_rows == 2
    before = table(tmp_path).made_by()["sha256"]
    (tmp_path / "3.jsonl").rename(tmp_path / "9.jsonl")
    assert table(tmp_path).made_by()["sha256"] == before, "names do not count"
    write(tmp_path / "4.jsonl", {"a": "another"})
    assert table(tmp_path).made_by()["sha256"] != before
    with pytest.raises(ConfigError, match=rf"captioners\.t\.path: {tmp_path}: the key 'a' is there 2 times; leave"):
        CaptionTable(table(tmp_path))


def test_the_bytes_of_the_table_are_in_the_identity_and_its_place_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ROWS)
    made_by = table(path, model="florence").made_by()
    assert made_by["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert made_by["model"] == "florence"
    assert str(tmp_path) not in str(made_by)
    (tmp_path / "other").mkdir()
    assert table(path.rename(tmp_path / "other" / "u.jsonl"), model="florence").made_by() == made_by


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", '{"key": "a", "caption": "x"}\n{"key": "a", "caption": "y"}\n', "the key 'a' is there 2 times"),
        ("t.jsonl", '{"key": "a", "caption": "x"}\n{"key": "b", ', "line 2 is not JSON"),
        ("t.jsonl", '{"key": "a", "caption": "x"}\n{"caption": "y"}\n', "row 2 has no key"),
        ("t.jsonl", '{"key": "a", "caption": "x"}\n{"key": ["b"], "caption": "y"}\n', "row 2: 'key' holds a list"),
        ("t.jsonl", '{"id": "a", "caption": "x"}\n', "has no column 'key'; it has: id, caption"),
        ("t.jsonl", '{"key": "a", "text": "x"}\n', "has no column 'caption'; it has: key, text"),
        ("t.csv", "key,text\na,x\n", "has no column 'caption'; it has: key, text"),
        ("t.csv", 'key,caption\na,"x\n', "line 2 is not CSV"),
        ("t.csv", "key,key\na,x\n", "names 'key' twice"),
        ("t.csv.gz", "key,caption\na,x\n", "cannot be read"),
        ("t.parquet", "PAR1", "is not a readable parquet file"),
        ("t.png", "x", "is no table; use jsonl, csv, tsv, parquet"),
        ("t.jsonl", "", "has no column 'key'"),
    ],
)
def test_a_table_that_cannot_be_read_or_is_ambiguous_is_refused_in_one_line(
    name: str, content: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        found(tmp_path / name, [])
    assert says in str(error.value)
    assert str(error.value).startswith("captioners.t.")
    assert "\n" not in str(error.value)
    assert "source" not in str(error.value)


def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "caption": [1.5]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"captioners\.t\.caption_column: .* is of type double, not text or a list"):
        found(tmp_path / "t.parquet", [])


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"captioners\.t\.path: {tmp_path}/absent.csv does not exist"):
        found(tmp_path / "absent.csv", [])


def test_a_url_whose_package_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str, *_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("stages.sources.files.open_far", missing)
    with pytest.raises(MachineError, match=r"captioners\.t\.path: s3://b/t\.csv cannot be opened: Install s3fs"):
        table("s3://b/t.csv").check()


def test_a_table_behind_a_url_is_read_as_a_local_one(tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    path = write(tmp_path / "t.parquet", ROWS)
    files.put(str(path), "/tables/t.parquet")
    try:
        near, far = table(path), table("memory://tables/t.parquet")
        assert far.made_by() == near.made_by()
        assert far.pinned() == far
        assert CaptionTable(far).captions(list(ROWS)) == CaptionTable(near).captions(list(ROWS))
        with pytest.raises(ConfigError, match=r"captioners\.t\.path: memory://tables/u\.parquet does not exist"):
            table("memory://tables/u.parquet").check()
    finally:
        files.rm("/tables", recursive=True)
