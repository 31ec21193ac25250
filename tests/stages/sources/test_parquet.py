"""Parquet: what a column may hold, images in other forms than bytes, and how much of a file is read."""

import base64
import datetime
import pickle
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from stages.sources.parquet import ParquetConfig
from stages.sources.records.parquet import ParquetRows
from tests.stages.sources.fetching import all_fetched, fetched

IMAGE = b"an image"
COCO = pa.list_(pa.struct([("raw", pa.string()), ("tokens", pa.list_(pa.string()))]))


def write(path: Path, caption: pa.Array | None = None, **columns: object) -> Path:
    if caption is not None:
        columns = {"caption": caption, "image": pa.array([IMAGE] * len(caption), pa.binary()), **columns}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def captions(path: Path, scratch: Path, column: str = "caption") -> list[tuple[str, ...] | str | None]:
    """The captions of each row, or the reason of its drop."""
    rows = all_fetched(ParquetConfig(path=str(path), caption_column=column).build(), scratch)
    return [row.reason or row.captions for row in rows]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None], pa.string()),
        pa.array(["a", None], pa.large_string()),
        pa.array(["a", None], pa.string_view()),
        pa.array([b"a", None], pa.binary()),
        pa.array([b"a", None], pa.large_binary()),
        pa.array([b"a", None], pa.binary_view()),
        pa.array([b"a", None], pa.binary(1)),
        pa.array(["a", None]).dictionary_encode(),
        pa.array([["a", None], []], pa.list_(pa.string())),
        pa.array([[b"a"], None], pa.large_list(pa.binary())),
        pa.array([[["a"], []], [[]]], pa.list_(pa.list_(pa.string()))),
        pa.array([["a"], None], pa.list_(pa.string(), 1)),
    ],
    ids=lambda column: str(column.type),
)
def test_captions_are_text_in_every_type_that_holds_text(tmp_path: Path, column: pa.Array) -> None:
    assert captions(write(tmp_path / "a.parquet", column), tmp_path / "scratch") == [("a",), "empty_caption"]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([1.5, float("nan")]), "is of type double, not text or a list of texts; name another column"),
        (pa.array([1, 2]), "is of type int64, not text"),
        (pa.array([True, False]), "is of type bool, not text"),
        (pa.array([datetime.date(2026, 1, 1)]), "is of type date32"),
        (pa.array([[("en", "a")]], pa.map_(pa.string(), pa.string())), "is of type map<string, string"),
        (pa.array([{"raw": "a"}]), r"is of type struct<raw: string>.*name a field of it, such as caption.raw"),
        (
            pa.array([[{"raw": "a", "tokens": ["a"]}]], COCO),
            r"is of type list<.*name a field of it, such as caption.raw",
        ),
        (pa.array([[1, 2]]), r"is of type list<element: int64>|is of type list<item: int64>"),
    ],
)
def test_a_caption_column_of_another_type_is_refused_by_column_and_type(
    tmp_path: Path, column: pa.Array, says: str
) -> None:
    source = ParquetConfig(path=str(write(tmp_path / "a.parquet", column))).build()
    with pytest.raises(ConfigError, match=rf"source.caption_column: .*a\.parquet: column 'caption' {says}"):
        source.check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url_column", pa.array([[1]])),
        ("key_column", pa.array([{"a": 1}])),
        ("transcription_column", pa.array([3])),
        ("label_column", pa.array([["a"]])),
        ("safebox_column", pa.array([1.0])),
        ("image_column", pa.array([3.5])),
        ("image_column", pa.array([[[1, 2]]])),
    ],
)
def test_every_other_column_is_refused_by_its_type_too(tmp_path: Path, field: str, value: pa.Array) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["a"]), other=value)
    with pytest.raises(ConfigError, match=rf"source.{field}: .*column 'other' is of type"):
        ParquetConfig(**{"path": str(path), field: "other"}).build().check()


def test_a_path_into_a_list_of_structs_gives_several_captions(tmp_path: Path) -> None:
    column = pa.array([[{"raw": "a", "tokens": []}, {"raw": "b", "tokens": []}], []], COCO)
    path = write(tmp_path / "a.parquet", column)
    assert captions(path, tmp_path / "scratch", "caption.raw") == [("a", "b"), "empty_caption"]


def test_a_path_that_leads_nowhere_names_the_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array([{"raw": "a", "n": 1}]))
    with pytest.raises(ConfigError, match=r"has no column 'caption.row'; 'caption' has: raw, n"):
        ParquetConfig(path=str(path), caption_column="caption.row").build().check()


def test_text_in_a_struct_that_is_not_utf_8_is_a_counted_drop(tmp_path: Path) -> None:
    texts = pa.array([b"caf\xe9", b"fine"]).view(pa.string())
    column = pa.StructArray.from_arrays([texts, pa.array([b"\xff", b"\xfe"])], names=["raw", "data"])
    path = write(tmp_path / "a.parquet", column)
    assert captions(path, tmp_path / "scratch", "caption.raw") == ["invalid_caption", ("fine",)]


def test_a_file_of_another_schema_is_refused_by_name_before_anything_is_made(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.parquet", pa.array(["a"]))
    write(tmp_path / "data" / "b.parquet", text=pa.array(["a"]), image=pa.array([IMAGE]))
    with pytest.raises(ConfigError, match=r"source.caption_column: .*b\.parquet has no column 'caption'"):
        ParquetConfig(path=str(tmp_path / "data")).build().check()


def test_images_are_base64_or_lists_of_bytes_too(tmp_path: Path) -> None:
    text = base64.b64encode(IMAGE).decode()
    columns = [pa.array([text, "?"]), pa.array([list(IMAGE), None], pa.list_(pa.uint8()))]
    for number, column in enumerate(columns):
        path = write(tmp_path / f"{number}.parquet", pa.array(["a", "b"]), image=column)
        rows = all_fetched(ParquetConfig(path=str(path)).build(), tmp_path / f"scratch-{number}")
        assert [(row.data, row.reason) for row in rows] == [(IMAGE, None), (None, ("bad_base64", "no_image")[number])]


def paths(tmp_path: Path, names: Sequence[str | None], **settings: str) -> list[tuple[bytes | None, str | None]]:
    """Data and reason of rows whose images are these paths, in tmp_path/data/sub/a.parquet."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "data" / "sub").mkdir(parents=True, exist_ok=True)
    cells = pa.array([{"bytes": None, "path": name} for name in names], kind)
    write(tmp_path / "data" / "sub" / "a.parquet", pa.array(["x"] * len(names)), image=cells)
    source = ParquetConfig(path=str(tmp_path / "data"), **settings).build()
    return [(row.data, row.reason) for row in all_fetched(source, tmp_path / "scratch")]


def test_an_image_without_bytes_is_read_from_its_path_inside_the_folder_only(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name in ("secret.png", "data/top.png", "data/sub/near.png"):
        (tmp_path / name).write_bytes(name.encode())
    data, secret = tmp_path / "data", str(tmp_path / "secret.png")
    names = ["near.png", "top.png", f"{data}/top.png", "none.png", "../../secret.png", "nul\0.png", None, secret]
    found = paths(tmp_path, [*names, f"file://{data}/top.png"])
    assert found == [
        (b"data/sub/near.png", None),
        (b"data/top.png", None),
        (b"data/top.png", None),
        (None, "missing_file"),
        (None, "unsafe_path"),
        (None, "unsafe_path"),
        (None, "no_image"),
        (None, "unsafe_path"),
        (None, "unsafe_path"),
    ]


def test_image_folder_names_another_folder_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(IMAGE)
    names = [str(tmp_path / "images" / "a.png"), "a.png", "../a.png"]
    found = paths(tmp_path, names, image_folder=str(tmp_path / "images"))
    assert found == [(IMAGE, None), (IMAGE, None), (None, "unsafe_path")]


def test_datasets_to_parquet_is_read_with_its_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.png").write_bytes(IMAGE)
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "caption": ["x"]})
    dataset.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    (row,) = all_fetched(ParquetConfig(path=str(tmp_path / "rows.parquet")).build(), tmp_path / "scratch")
    assert (row.data, row.reason) == (IMAGE, None)


# ---- how much is read ----


def big_table(path: Path, rows: int = 2000, row_bytes: int = 10_000) -> None:
    """One row group, in pages of 100 rows."""
    data = np.random.default_rng(0).bytes(row_bytes)
    images = pa.array([number.to_bytes(4) + data for number in range(rows)], pa.binary())
    pq.write_table(pa.table({"image": images}), path, compression="none", use_dictionary=False, write_batch_size=100)


def test_a_shard_of_a_large_row_group_costs_its_rows_and_not_the_group(tmp_path: Path) -> None:
    big_table(tmp_path / "a.parquet")
    before = pa.total_allocated_bytes()
    rows = ParquetRows(str(tmp_path / "a.parquet"), ["image"])
    peak = 0
    for number, record in enumerate(rows.read(range(500))):
        assert record["image"][:4] == number.to_bytes(4)
        peak = max(peak, pa.total_allocated_bytes() - before)
    rows.close()
    assert peak < 2_000_000, "of 20 MB"


def test_a_file_stays_open_between_shards_and_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    open_group = ParquetRows._open
    monkeypatch.setattr(ParquetRows, "_open", lambda self, group: (opened.append(group), open_group(self, group))[1])
    path = write(tmp_path / "a.parquet", pa.array([f"caption {i}" for i in range(100)]))
    rows = all_fetched(ParquetConfig(path=str(path)).build(), tmp_path / "scratch", shard_size=7)
    assert [row.captions for row in rows] == [(f"caption {i}",) for i in range(100)]
    assert opened == [0]


def test_earlier_rows_and_other_row_groups_are_read_in_any_order_of_shards(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": list(range(50))}), tmp_path / "a.parquet", row_group_size=20)
    rows = ParquetRows(str(tmp_path / "a.parquet"), ["n"])
    for wanted in ([0, 1, 19, 20, 49], [3], [3, 4, 41], [18], [17]):
        assert [record["n"] for record in rows.read(wanted)] == wanted
    rows.close()


def test_a_file_behind_a_url_is_read_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array([f"caption {i}" for i in range(100)]))
    memory = fsspec.filesystem("memory")
    memory.pipe("/parquet/a.parquet", path.read_bytes())
    rows = all_fetched(ParquetConfig(path="memory://parquet/a.parquet").build(), tmp_path / "scratch", 30)
    assert [(row.captions, row.data) for row in rows] == [((f"caption {i}",), IMAGE) for i in range(100)]
    memory.rm("/parquet", recursive=True)


def test_a_source_with_an_open_file_goes_to_another_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["a", "b"]))
    source = ParquetConfig(path=str(path)).build()
    all_fetched(source, tmp_path / "scratch", 1)
    copy = pickle.loads(pickle.dumps(source))
    assert [row.captions for row in all_fetched(copy, tmp_path / "again")] == [("a",), ("b",)]


def test_rows_without_any_wanted_column_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["a", "b"]))
    source = ParquetConfig(path=str(path), image_column=None, caption_column=None).build()
    assert [row.captions for row in all_fetched(source, tmp_path / "scratch")] == [("",), ("",)]


@pytest.mark.parametrize("where", ["header", "checksum"])
def test_a_damaged_page_costs_the_rest_of_its_row_group_and_nothing_else(tmp_path: Path, where: str) -> None:
    path = tmp_path / "a.parquet"
    images = [bytes([number]) * 1000 for number in range(200)]
    table = pa.table({"image": images, "caption": [f"number {number}" for number in range(200)]})
    pq.write_table(
        table,
        path,
        row_group_size=100,
        write_batch_size=10,
        data_page_size=10_000,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
        write_statistics=False,
    )
    data = bytearray(path.read_bytes())
    place = data.index(images[50]) if where == "checksum" else data.index(images[50]) - 30
    data[place : place + 20] = b"\xff" * 20
    path.write_bytes(data)
    source = ParquetConfig(path=str(path)).build()
    rows = [row for shard in fetched(source, tmp_path / "scratch", 30) for row in shard[1]]
    assert len(rows) == 200
    bad = [number for number, row in enumerate(rows) if row.reason == "unreadable_row"]
    assert bad == list(range(bad[0], 100))
    assert 30 <= bad[0] <= 50
    assert [row.data for row in rows if row.reason is None] == images[: bad[0]] + images[100:]


def test_a_file_that_cannot_be_read_is_no_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["a", "b"]))
    rows = ParquetRows(str(path), ["caption"])

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rows, "_record", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(rows.read([0]))
