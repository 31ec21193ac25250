"""One small source of each kind that needs no further package, with rows that can be used and rows that cannot."""

import base64
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.sources.base import Source
from stages.sources.download.config import DownloadConfig
from stages.sources.folder import FolderConfig
from stages.sources.parquet import ParquetConfig
from stages.sources.synthetic.source import SyntheticConfig
from stages.sources.tars import WebdatasetConfig
from stages.sources.tsv import TsvConfig
from stages.sources.urls import UrlsConfig

IMAGE = b"an image"
LOOPBACK = DownloadConfig(retries=0, allow_private_addresses=True)

TEXTS: list[tuple[str, object, object, object, bytes | None]] = [
    ("a", "one\n", "STOP", "7", IMAGE),
    ("b", ["two", " two", "three"], None, None, IMAGE),
    ("a", "again", None, None, IMAGE),
    ("empty", "  ", "x", None, IMAGE),
    ("none", [], None, None, None),
    ("broken", "caf\udce9", None, None, None),
    ("label", "four", None, "many", IMAGE),
    ("no image", "five", "six", None, None),
]
"""Key, caption, transcription, label and image of each row; two have the same key."""


def write_table(path: Path, column: str, values: list[object]) -> None:
    """A .jsonl of the texts, with one more column."""
    lines = [
        {"id": key, column: value, "caption": caption, "written": written, "label": label}
        for value, (key, caption, written, label, _) in zip(values, TEXTS, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def add_members(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_folder(folder: Path) -> None:
    """Images below a folder with a caption file each, and a table that names some of them."""
    folder.mkdir()
    for key, _, _, _, data in TEXTS:
        if data is not None:
            (folder / f"{key}.png").write_bytes(data)
    (folder / "b.txt").write_text("two\n two\nthree\n")
    (folder / "label.txt").write_bytes(b"caf\xe9")


def write_tar(path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for number, (key, caption, written, label, data) in enumerate(TEXTS):
        fields = {"caption": caption, "written": written, "label": label, "url": f"http://example.org/{number}"}
        if data is not None:
            members += [(f"{key}.png", data), (f"{key}.json", json.dumps(fields).encode())]
    members += [
        ("no image.txt", b"five"),
        ("text.txt", b"from the text"),
        ("text.jpg", IMAGE),
        ("text.JSON", b"{oops"),
    ]
    add_members(path, members)


def write_parquet(path: Path) -> None:
    good = [row for row in TEXTS if row[0] != "broken"]
    captions = [caption if isinstance(caption, list) else [caption] for _, caption, *_ in good]
    table = {
        "id": [None if key == "b" else key for key, *_ in good],
        "image": [data for *_, data in good],
        "caption": pa.array(captions, pa.list_(pa.string())),
        "written": [written for _, _, written, _, _ in good],
        "label": [label for _, _, _, label, _ in good],
        "link": [f"http://example.org/{number}" for number in range(len(good))],
    }
    pq.write_table(pa.table(table), path, row_group_size=3)


def write_tsv(path: Path) -> None:
    image = base64.b64encode(IMAGE)
    fields = [
        [b"0", b"http://example.org/0", b"one", b"-", image],
        [b"1", b"", b"", b"-", image],
        [b"2", b"", b"caf\xe9", b"-", image],
        [b"3", b"", b"two", b"-", b""],
        [b"4", b"", b"three", b"-", b"???"],
        [b"5", b"too few"],
        [b"6", b"http://caf\xe9", b"four", b"-", image],
    ]
    path.write_bytes(b"\n".join(b"\t".join(line) for line in fields))


def make_sources(root: Path, server: str) -> dict[str, Source]:
    """Sources by name, over files that this writes below `root`; `server` is the address of the URL lists' images."""
    root.mkdir()
    urls: list[object] = [
        f"{server}/{'missing' if data is None else 'image'}/{n}" for n, (*_, data) in enumerate(TEXTS)
    ]
    write_table(root / "urls.jsonl", "url", urls)
    (root / "urls.txt").write_text(f"{server}/image/0\n{server}/missing/1\n\n")
    write_folder(root / "loose")
    write_folder(root / "table")
    write_table(
        root / "table" / "captions.jsonl", "file", [f"{key}.png" for key, *_ in TEXTS[:-1]] + ["../secret.png"]
    )
    write_tar(root / "tar.tar")
    write_parquet(root / "rows_7.parquet")
    write_tsv(root / "lines.tsv")
    (root / "arrays").mkdir()
    np.save(root / "arrays" / "img_emb_7.npy", np.arange(14, dtype=np.float32).reshape(7, 2))
    np.save(root / "arrays" / "img_emb_8.npy", np.arange(14, dtype=np.float32).reshape(7, 2))
    (root / "tar_8.tar").write_bytes((root / "tar.tar").read_bytes())
    writing = {"transcription_column": "written", "label_column": "label"}
    listed, table = {"path": str(root / "urls.jsonl"), "download": LOOPBACK}, {"path": str(root / "rows_7.parquet")}
    arrays = {"clip": {"folder": str(root / "arrays")}}
    configs = {
        "urls": UrlsConfig(**listed),
        "urls with keys and writing": UrlsConfig(**listed, **writing, key_column="id"),
        "urls without captions": UrlsConfig(path=str(root / "urls.txt"), download=LOOPBACK),
        "synthetic": SyntheticConfig(num_samples=3, dead_links=1),
        "synthetic words": SyntheticConfig(num_samples=2, scene="words", dead_links=0),
        "folder": FolderConfig(path=str(root / "loose")),
        "folder with a table": FolderConfig(path=str(root / "table")),
        "folder with a table and writing": FolderConfig(path=str(root / "table"), **writing),
        "webdataset": WebdatasetConfig(path=str(root / "tar.tar"), **writing),
        "webdataset with arrays": WebdatasetConfig(path=str(root / "tar_8.tar"), arrays=arrays),
        "parquet": ParquetConfig(**table, **writing, url_column="link"),
        "parquet with keys and arrays": ParquetConfig(**table, key_column="id", arrays=arrays),
        "tsv": TsvConfig(path=str(root / "lines.tsv"), url_field=2),
    }
    return {name: config.build() for name, config in configs.items()}
