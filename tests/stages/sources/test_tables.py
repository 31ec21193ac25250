"""URL lists of every format give the same rows; what cannot be read is named."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from stages.sources.download.config import DownloadConfig
from stages.sources.files import expand
from stages.sources.records.cells import InvalidLine, captions_of
from stages.sources.tables import FORMATS, columns, read_rows, table_format
from stages.sources.urls import UrlsConfig, UrlsSource
from tests.image_server import body, serve
from tests.images import BLUE, RED, plain_png
from tests.stages.sources.fetching import fetched

ROWS = [
    {"url": "http://example.org/a.png", "caption": "a red square"},
    {"url": "http://example.org/b.png?x=1,2", "caption": 'says "stop", twice'},
    {"url": "http://example.org/c.png", "caption": "خط عربي 🐈"},
]


def csv_bytes(rows: list[dict[str, str]]) -> bytes:
    cells = [["url", "caption"], *([row["url"], row["caption"]] for row in rows)]
    return "\r\n".join(",".join('"' + c.replace('"', '""') + '"' for c in line) for line in cells).encode()


def tsv_bytes(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(["url\tcaption", *(f"{row['url']}\t{row['caption']}" for row in rows)]).encode()


def jsonl_bytes(rows: list[dict[str, str]]) -> bytes:
    return "\n\n".join(json.dumps(row) for row in rows).encode()


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_list(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes the rows in the format and compression that the name tells."""
    kind = table_format(str(path))
    if kind == "parquet":
        write_parquet(path, rows)
        return
    data = {"csv": csv_bytes, "tsv": tsv_bytes, "jsonl": jsonl_bytes}[kind](rows)
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    }
    path.write_bytes(pack.get(path.suffix, bytes)(data))


NAMES = [
    "l.csv",
    "l.tsv",
    "l.jsonl",
    "l.ndjson",
    "l.parquet",
    "l.pq",
    "l.csv.gz",
    "l.tsv.bz2",
    "l.jsonl.xz",
    "l.csv.zst",
    "L.CSV",
]

LOOPBACK = DownloadConfig(retries=0, allow_private_addresses=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    write_list(tmp_path / name, ROWS)
    assert list(read_rows(str(tmp_path / name), ["url", "caption"])) == ROWS
    assert list(columns(str(tmp_path / name))) == ["url", "caption"]


def test_every_format_gives_the_same_samples(tmp_path: Path) -> None:
    with serve({"/a.png": body(plain_png(RED)), "/b.png": body(plain_png(BLUE))}) as server:
        rows = [
            {"url": server.url("/a.png"), "caption": "a red square"},
            {"url": server.url("/missing.png"), "caption": "x"},
            {"url": server.url("/b.png"), "caption": ' a "blue" square '},
        ]
        found = {}
        for name in NAMES:
            write_list(tmp_path / name, rows)
            source = UrlsSource(UrlsConfig(path=str(tmp_path / name), download=LOOPBACK))
            source.check()
            found[name] = fetched(source, tmp_path / "scratch" / name, 2)
    samples = [o for _, originals in found["l.csv"] for o in originals]
    assert [(o.row, o.key, o.captions, o.data, o.reason) for o in samples] == [
        (0, "000000000", ("a red square",), plain_png(RED), None),
        (1, "000000001", ("x",), None, "http_404"),
        (0, "000000002", ('a "blue" square',), plain_png(BLUE), None),
    ]
    assert [index for index, _ in found["l.csv"]] == [0, 1]
    assert all(shards == found["l.csv"] for shards in found.values())


@pytest.mark.parametrize("place", ["file", "folder", "glob"])
def test_a_txt_list_gives_the_same_images_with_empty_captions(tmp_path: Path, place: str) -> None:
    with serve({"/a.png": body(plain_png(RED)), "/b.png": body(plain_png(BLUE))}) as server:
        urls = [server.url("/a.png"), server.url("/b.png")]
        (tmp_path / "lists").mkdir()
        (tmp_path / "lists" / "l.txt").write_text(f"\ufeff{urls[0]}\n\n  {urls[1]}\r\n", encoding="utf-8")
        path = {"file": "lists/l.txt", "folder": "lists", "glob": "lists/*.txt"}[place]
        source = UrlsSource(UrlsConfig(path=str(tmp_path / path), download=LOOPBACK))
        source.check()
        ((_, originals),) = fetched(source, tmp_path / "scratch")
    assert [(o.key, o.url, o.captions, o.data) for o in originals] == [
        ("000000000", urls[0], ("",), plain_png(RED)),
        ("000000001", urls[1], ("",), plain_png(BLUE)),
    ]


def test_a_list_without_caption_column_gives_empty_captions(tmp_path: Path) -> None:
    with serve({"/a.png": body(plain_png(RED))}) as server:
        (tmp_path / "l.csv").write_text(f"url\n{server.url('/a.png')}\n")
        source = UrlsSource(UrlsConfig(path=str(tmp_path / "l.csv"), caption_column=None, download=LOOPBACK))
        source.check()
        ((_, (original,)),) = fetched(source, tmp_path / "scratch")
    assert (original.captions, original.data, original.reason) == (("",), plain_png(RED), None)


def test_keys_count_on_over_the_files_of_a_folder(tmp_path: Path) -> None:
    for name, row in zip(("b.csv", "a.tsv", "sub/c.jsonl"), ROWS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_list(tmp_path / name, [row])
    (tmp_path / "readme.md").write_text("no list")
    (shard,) = UrlsSource(UrlsConfig(path=str(tmp_path))).shards(10)
    assert shard.rows == [
        ["000000000", ROWS[1]["url"], [ROWS[1]["caption"]], False],
        ["000000001", ROWS[0]["url"], [ROWS[0]["caption"]], False],
        ["000000002", ROWS[2]["url"], [ROWS[2]["caption"]], False],
    ]


def test_only_the_second_row_of_a_key_is_marked_and_rows_without_a_key_get_one(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(
        '{"id": 7, "url": "a", "caption": "x"}\n'
        '{"id": "7", "url": "b", "caption": "x"}\n'
        '{"id": null, "url": "c", "caption": "x"}\n'
    )
    (shard,) = UrlsSource(UrlsConfig(path=str(tmp_path / "l.jsonl"), key_column="id")).shards(10)
    assert [(row[0], row[3]) for row in shard.rows] == [("7", False), ("7", True), ("000000002", False)]


def lines(tmp_path: Path, name: str, data: bytes) -> list[dict]:
    (tmp_path / name).write_bytes(data)
    return list(read_rows(str(tmp_path / name), None))


def test_csv_cells_may_hold_quotes_commas_and_line_ends(tmp_path: Path) -> None:
    rows = lines(tmp_path, "l.csv", b'\xef\xbb\xbfurl,caption\r\nu,"a ""b"", c\nd"\r\n')
    assert rows == [{"url": "u", "caption": 'a "b", c\nd'}]


def test_quotes_are_literal_in_tsv(tmp_path: Path) -> None:
    rows = lines(tmp_path, "l.tsv", b'url\tcaption\nu\t"open\nv\tclosed"\n')
    assert rows == [{"url": "u", "caption": '"open'}, {"url": "v", "caption": 'closed"'}]


def described(rows: list[dict]) -> list[object]:
    """Records, and the details of invalid lines."""
    return [row.detail if isinstance(row, InvalidLine) else row for row in rows]


@pytest.mark.parametrize(("name", "comma"), [("l.csv", b","), ("l.tsv", b"\t")])
def test_a_line_with_other_fields_than_the_first_is_invalid_and_a_blank_one_no_row(
    tmp_path: Path, name: str, comma: bytes
) -> None:
    rows = lines(tmp_path, name, b"url,caption\na\n\nb,c,d\r\ne,f\ng,h,,\n".replace(b",", comma))
    assert described(rows) == [
        "line 2 has 1 fields for 2 columns",
        "line 4 has 3 fields for 2 columns",
        {"url": "e", "caption": "f"},
        {"url": "g", "caption": "h"},
    ]


def test_a_quote_that_is_not_closed_costs_its_own_line_only(tmp_path: Path) -> None:
    rows = lines(tmp_path, "l.csv", b'url,caption\na,"12 inch\nb,two\nc,"three, 3"\nd,"open\ne,five\n')
    assert described(rows) == [
        "line 2 is not CSV: ',' expected after '\"'",
        {"url": "b", "caption": "two"},
        {"url": "c", "caption": "three, 3"},
        "line 5 is not CSV: unexpected end of data",
        {"url": "e", "caption": "five"},
    ]


def test_a_quote_that_is_not_closed_is_not_looked_for_to_the_end_of_a_long_file(tmp_path: Path) -> None:
    rows = lines(tmp_path, "l.csv", b'url,caption\na,"open\n' + b"b,two\n" * 3000)
    assert described(rows[:1]) == ["line 2 is not CSV: a quote is not closed within 1000 lines"]
    assert rows[1:] == [{"url": "b", "caption": "two"}] * 3000


def test_a_json_line_broken_over_two_lines_is_two_invalid_lines(tmp_path: Path) -> None:
    rows = lines(tmp_path, "l.jsonl", b'{"url": "a",\n"caption": "b"}\n{"url": "c"}\n')
    assert [isinstance(row, InvalidLine) for row in rows] == [True, True, False]
    assert rows[2] == {"url": "c"}


@pytest.mark.parametrize("name", ["l.csv", "l.tsv", "l.jsonl", "l.txt"])
def test_rows_end_at_line_feeds_only(tmp_path: Path, name: str) -> None:
    text = "http://a/\u2028\x85\x0b\x0cb"
    content = {
        "l.csv": f"url\n{text}\nv\n",
        "l.tsv": f"url\r\n{text}\r\nv\r\n",
        "l.txt": f"{text}\r\nv\n",
        "l.jsonl": json.dumps({"url": text}, ensure_ascii=False) + '\n{"url": "v"}\n',
    }[name]
    assert lines(tmp_path, name, content.encode()) == [{"url": text}, {"url": "v"}]


def test_a_carriage_return_in_a_cell_of_tsv_ends_no_row(tmp_path: Path) -> None:
    assert lines(tmp_path, "l.tsv", b"url\tcaption\nu\ta\rb\n") == [{"url": "u", "caption": "a\rb"}]


@pytest.mark.parametrize(("name", "comma"), [("l.csv", ","), ("l.tsv", "\t")])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path, name: str, comma: str) -> None:
    with pytest.raises(ConfigError, match=r"its first line names 'caption' twice"):
        lines(tmp_path, name, "url,caption,,,caption\nu,a,,,b\n".replace(",", comma).encode())


def test_a_table_in_utf_16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"l\.csv cannot be read to its end: its text is UTF-16, not UTF-8"):
        lines(tmp_path, "l.csv", "url\nu\n".encode("utf-16"))


def test_a_table_of_which_no_line_can_be_parsed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{\n "url": "u"\n}\n')
    with pytest.raises(ConfigError, match=r"l\.jsonl: line 1 is not JSON: .*no other line can be used"):
        columns(str(tmp_path / "l.jsonl"))


def test_rows_that_cannot_be_parsed_or_used_are_counted_drops_and_harm_no_other(tmp_path: Path) -> None:
    with serve({"/a.png": body(plain_png(RED))}) as server:
        url = server.url("/a.png")
        rows = [
            {"id": 1, "url": url, "caption": "good", "written": None},
            {"id": 2, "url": url, "caption": {"raw": "a struct"}},
            {"id": 3, "url": 4, "caption": "x"},
            {"id": [5], "url": url, "caption": "x"},
            {"id": 6, "url": url, "caption": "x", "written": {"a": 1}},
            {"id": 7, "url": url, "caption": float("nan")},
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "l.jsonl").write_text(text + '{"id": 8,\n')
        columns = {"key_column": "id", "transcription_column": "written"}
        config = UrlsConfig(path=str(tmp_path / "l.jsonl"), download=LOOPBACK, **columns)
        ((_, originals),) = fetched(UrlsSource(config), tmp_path / "scratch", 10)
    json_error = "Expecting property name enclosed in double quotes"
    assert [(o.key, o.reason, o.detail) for o in originals] == [
        ("1", None, ""),
        ("2", "unsupported_type", "'caption' holds a struct, not text"),
        ("3", "unsupported_type", "'url' holds a number, not text"),
        ("000000003", "unsupported_type", "'id' holds a list, not text"),
        ("6", "unsupported_type", "'written' holds a struct, not text"),
        ("7", "empty_caption", ""),
        ("000000006", "invalid_line", f"line 7 is not JSON: {json_error}, column 11"),
    ]


def test_a_table_with_a_first_line_alone_has_no_rows_and_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption\n")
    (tmp_path / "b.csv").write_text("url,caption\nu,x\n")
    source = UrlsSource(UrlsConfig(path=str(tmp_path)))
    source.check()
    assert [row[1] for shard in source.shards(10) for row in shard.rows] == ["u"]
    (tmp_path / "b.csv").unlink()
    with pytest.raises(ConfigError, match="holds no rows; give a list with at least one row"):
        source.check()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("files", [1, 3])
def test_the_order_of_json_objects_does_not_decide_the_columns(
    tmp_path: Path, order: tuple[int, ...], files: int
) -> None:
    rows = ['{"url": "a"}', '{"caption": "x", "url": "b", "written": "w"}', "{broken"]
    for number, place in enumerate(order):
        with (tmp_path / f"{number % files}.jsonl").open("a") as file:
            file.write(rows[place] + "\n")
    source = UrlsSource(UrlsConfig(path=str(tmp_path), transcription_column="written"))
    source.check()
    found = [row for shard in source.shards(10) for row in source.rows_of(shard)]
    assert sorted((row.url, tuple(row.captions or ())) for row in found) == [("", ()), ("a", ()), ("b", ("x",))]
    with pytest.raises(ConfigError, match=r"has no column 'text'; it has: "):
        UrlsSource(UrlsConfig(path=str(tmp_path), caption_column="text")).check()


def test_json_is_read_only_until_all_wanted_columns_were_seen(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"a": 1}\n{"b": {"c": 2}}\n{"d": 3}\n')
    assert list(columns(str(tmp_path / "l.jsonl"), ["a", "b.c"])) == ["a", "b"]
    assert list(columns(str(tmp_path / "l.jsonl"))) == ["a", "b", "d"]


def test_every_table_of_a_list_must_have_the_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption\nu,x\n")
    (tmp_path / "b.csv").write_text("url,text\nu,x\n")
    with pytest.raises(
        ConfigError, match=r"source.caption_column: .*b\.csv has no column 'caption'; it has: url, text"
    ):
        UrlsSource(UrlsConfig(path=str(tmp_path))).check()


def test_a_huge_cell_and_a_nul_are_read(tmp_path: Path) -> None:
    rows = lines(tmp_path, "l.csv", b"url,caption\nu," + b"x" * 300_000 + b"\nv,a\0b\n")
    assert [len(rows[0]["caption"]), rows[1]["caption"]] == [300_000, "a\0b"]


@pytest.mark.parametrize("name", ["l.csv", "l.tsv", "l.txt"])
def test_bytes_that_are_not_utf_8_become_surrogate_escapes(tmp_path: Path, name: str) -> None:
    (row,) = lines(tmp_path, name, b"caf\xe9" if name == "l.txt" else b"url\ncaf\xe9\n")
    assert row == {"url": "caf\udce9"}


@pytest.mark.parametrize("line", [b"{oops", b"[1, 2]", b'"text"', b"null", b"[" * 100_000, b"\xff"])
def test_a_json_line_that_is_no_object_is_an_invalid_line(tmp_path: Path, line: bytes) -> None:
    rows = lines(tmp_path, "l.jsonl", line + b'\n{"url": "u"}\n')
    assert isinstance(rows[0], InvalidLine)
    assert rows[1:] == [{"url": "u"}]


def test_parquet_text_that_is_not_utf_8_becomes_surrogate_escapes(tmp_path: Path) -> None:
    bad = pa.array([b"caf\xe9", b"fine"]).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2]), pa.array([b"\xff", b"ok"]).view(pa.string()))
    pq.write_table(pa.table({"url": ["u", "v"], "caption": bad, "more": lists}), tmp_path / "l.parquet")
    assert list(read_rows(str(tmp_path / "l.parquet"), None)) == [
        {"url": "u", "caption": "caf\udce9", "more": ["\udcff"]},
        {"url": "v", "caption": "fine", "more": ["ok"]},
    ]


def test_only_wanted_columns_of_parquet_are_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "l.parquet", ROWS)
    rows = list(read_rows(str(tmp_path / "l.parquet"), ["caption", "absent"]))
    assert rows == [{"caption": row["caption"]} for row in ROWS]


@pytest.mark.parametrize(
    ("value", "captions"),
    [("a", ["a"]), (["a", None, "b"], ["a", "b"]), (None, []), ([], []), ("", [""]), (float("nan"), [])],
)
def test_a_caption_cell_holds_a_text_a_list_or_nothing(value: object, captions: list[str]) -> None:
    assert captions_of({"c": value}, "c") == captions
    assert captions_of({"c": value}, "absent") == []
    assert captions_of({"c": value}, None) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv", "csv"),
        ("a.b.CSV.GZ", "csv"),
        ("s3://bucket/x.jsonl.zst", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.pq", "parquet"),
        ("a.xyz", "xyz"),
        ("part-0", "part-0"),
    ],
)
def test_the_format_is_told_by_the_name(name: str, kind: str) -> None:
    assert table_format(name) == kind


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "sub/c.tsv", "d.md", "part[1].csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def names(path: str) -> list[str]:
        found = expand(path, "source.path", FORMATS)
        return [str(Path(name.removeprefix("file://")).relative_to(tmp_path)) for name in found]

    assert names(str(tmp_path)) == ["a.csv", "b.csv", "part[1].csv", "sub/c.tsv"]
    assert names(str(tmp_path / "?.csv")) == ["a.csv", "b.csv"]
    assert names(str(tmp_path / "b.csv")) == ["b.csv"]
    assert names(f"file://{tmp_path}/b.csv") == ["b.csv"]
    assert names(str(tmp_path / "part[1].csv")) == ["part[1].csv"], "a file that exists is no glob"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("l.csv.gz", b"no gzip", "l.csv.gz cannot be read to its end"),
        ("l.csv.gz", gzip.compress(b"url\n" + bytes(range(256)) * 99)[:-20], "l.csv.gz cannot be read to its end"),
        ("l.csv.xz", lzma.compress(b"url\nu\n")[:-3], "l.csv.xz cannot be read to its end"),
        ("l.csv.bz2", b"BZh9 no", "l.csv.bz2 cannot be read to its end"),
        ("l.parquet", b"no parquet", "l.parquet is not a readable parquet file"),
        ("l.parquet", b"", "l.parquet is not a readable parquet file"),
        ("l.doc", b"x", r"format 'doc' is not supported; use txt, csv, tsv, jsonl, parquet"),
    ],
)
def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        lines(tmp_path, name, data)


def test_a_damaged_parquet_page_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "l.parquet", [{"url": f"{i:050d}", "caption": "x"} for i in range(5000)])
    data = bytearray((tmp_path / "l.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    (tmp_path / "l.parquet").write_bytes(data)
    with pytest.raises(ConfigError, match=r"l\.parquet is not a readable parquet file: .*; copy or download it again"):
        list(read_rows(str(tmp_path / "l.parquet"), None))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("absent.csv", "source.path: absent.csv does not exist; check the path"),
        ("absent-*.csv", r"source.path: absent-\*.csv does not exist"),
        ("gopher://x/y.csv", "source.path: gopher://x/y.csv cannot be opened: Protocol not known: gopher"),
    ],
)
def test_a_path_where_nothing_is_is_refused(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        expand(path, "source.path", FORMATS)
