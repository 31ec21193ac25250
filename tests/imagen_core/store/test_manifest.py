"""manifest.json: proves itself, and refuses what the reader could not use."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagen_core import store as st

HEADER: dict[str, Any] = {
    "writer": 'test "é"\n',
    "groups": {
        "samples": {"kind": "samples"},
        "images-8": {
            "kind": "images",
            "size_px": 8,
            "format": "hdf5",
            "codec": "raw",
            "config": {"filter": "bicubic"},
        },
    },
}


def shard(index: int, rows: int = 3, excluded: tuple[int, ...] = ()) -> dict[str, Any]:
    def entry(path: str) -> dict[str, Any]:
        return {"path": path, "bytes": 10, "sha256": hashlib.sha256(path.encode()).hexdigest(), "rows": rows}

    files = {"samples": entry(f"samples/{index:05d}.parquet"), "images-8": entry(f"images-8/{index:05d}.h5")}
    return {"index": index, "rows": rows, "excluded": {"bad": list(excluded)}, "files": files}


def seal(body: bytes) -> bytes:
    return body + b'"sha256":"%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def test_what_was_written_is_loaded(tmp_path: Path) -> None:
    st.write_manifest(tmp_path / "manifest.json", HEADER, iter([shard(0), shard(7, 2, (1,)), shard(123456)]))
    manifest = st.load_manifest(tmp_path)
    assert (manifest.num_shards, manifest.num_rows, manifest.num_samples, manifest.num_bytes) == (3, 8, 7, 60)
    assert manifest.header == {"schema_version": 2, **HEADER}
    assert manifest.images[8].config == {"filter": "bicubic"}
    assert manifest.groups["images-8"].format == "hdf5"
    assert [entry.index for entry in manifest.shards()] == [0, 7, 123456]
    assert manifest.shard(1).excluded == {1: "bad"}
    entry = manifest.shard(2).files["images-8"]
    digest = hashlib.sha256(b"images-8/123456.h5").hexdigest()
    assert entry == st.FileEntry("images-8/123456.h5", 10, digest, 3)


def test_the_manifest_is_plain_json_with_one_line_per_shard(tmp_path: Path) -> None:
    st.write_manifest(tmp_path / "manifest.json", HEADER, [shard(0), shard(1)])
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    assert raw["shards"] == [shard(0), shard(1)]
    assert (raw["schema_version"], raw["num_samples"], raw["writer"]) == (2, 6, HEADER["writer"])
    assert len([line for line in text.splitlines() if line.startswith('{"excluded"')]) == 2


def test_a_store_of_no_shards_is_loaded(tmp_path: Path) -> None:
    st.write_manifest(tmp_path / "manifest.json", HEADER, [])
    assert st.load_manifest(tmp_path).num_samples == 0
    assert json.loads((tmp_path / "manifest.json").read_bytes())["shards"] == []


def test_a_shard_without_rows_may_have_no_files(tmp_path: Path) -> None:
    empty = {"index": 1, "rows": 0, "files": {}}
    st.write_manifest(tmp_path / "manifest.json", HEADER, [shard(0), empty])
    assert st.load_manifest(tmp_path).shard(1).files == {}


def test_the_same_input_makes_the_same_bytes_and_no_other_file(tmp_path: Path) -> None:
    st.write_manifest(tmp_path / "manifest.json", HEADER, [shard(0)])
    first = (tmp_path / "manifest.json").read_bytes()
    reordered = dict(reversed(HEADER.items()))
    st.write_manifest(tmp_path / "manifest.json", reordered, [shard(0)])
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    st.write_manifest(path, HEADER, [shard(0)])
    data = path.read_bytes()
    for position in range(len(data)):
        in_digest = position >= len(data) - 80  # where 0x20 turns a hex digit to upper case
        for flip in (0x01, 0x20) if in_digest else (0x01,):
            changed = bytearray(data)
            changed[position] ^= flip
            path.write_bytes(changed)
            with pytest.raises(st.StoreError):
                st.load_manifest(tmp_path)


@pytest.mark.parametrize(
    "change", [lambda d: d + b"\n", lambda d: b" " + d, lambda d: d[:-1], lambda d: d[:50], lambda d: b""]
)
def test_an_added_or_missing_byte_is_noticed(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "manifest.json"
    st.write_manifest(path, HEADER, [shard(0)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(st.ManifestError, match=r"manifest\.json: .* do not match their own sha256"):
        st.load_manifest(tmp_path)


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    newer = seal(b'{\n"schema_version":4,\n"shards":[\n],\n"num_bytes":0,\n')
    for data in (newer, json.dumps({"schema_version": 4}).encode()):
        path.write_bytes(data)
        with pytest.raises(st.StoreError, match=r"schema_version is 4, .* up to 3; upgrade"):
            st.load_manifest(tmp_path)


def test_a_sealed_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    totals = b'"num_bytes":0,\n"num_rows":0,\n"num_samples":%d,\n"num_shards":0,\n'
    head = b'{\n"groups":{"samples":{"kind":"samples"}},\n"schema_version":1,\n"shards":[\n],\n'
    for body in (b"[1, 2,\n", b'{"schema_version":1,\n', head + totals % 5):
        (tmp_path / "manifest.json").write_bytes(seal(body))
        with pytest.raises(st.ManifestError, match="not a manifest"):
            st.load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(seal(head + totals % 0))
    assert st.load_manifest(tmp_path).num_samples == 0


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(st.StoreError, match=r"not a store \(no manifest\.json\)"):
        st.load_manifest(tmp_path)
    with pytest.raises(st.StoreError, match="not a store"):
        st.load_manifest(tmp_path / "missing")


def test_a_run_folder_names_the_store_in_it(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    st.write_manifest(tmp_path / "store" / "manifest.json", HEADER, [])
    with pytest.raises(st.StoreError, match=r"open .*/store$"):
        st.load_manifest(tmp_path)


def test_an_unfinished_store_says_run_again(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    with pytest.raises(st.StoreError, match="not finished; run the same pipeline command again"):
        st.load_manifest(tmp_path)


def _without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != key}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_without(shard(0), "rows"), "shard 0: missing or wrong field 'rows'"),
        (shard(0, -1), "rows must be an integer"),
        (shard(0, 3, (3,)), "excluded rows"),
        (shard(0, 3, (1, 1)), "excluded rows"),
        (shard(0) | {"files": {"samples": shard(0)["files"]["samples"]}}, "'images-8'"),
        (shard(0) | {"files": shard(1)["files"]}, "should be 'images-8/00000.h5'"),
        (shard(0) | {"files": shard(0)["files"] | {"text-x": {}}}, "unknown groups"),
        (shard(0, 4) | {"rows": 3}, "has 4 rows, the shard has 3"),
    ],
)
def test_a_wrong_shard_is_refused_and_leaves_nothing(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.write_manifest(tmp_path / "manifest.json", HEADER, [bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 4}, "schema_version must be 1 to 3"),
        ({"num_samples": 3}, "added by write_manifest"),
        ({"groups": {}}, "lack 'samples'"),
        (
            {"groups": HEADER["groups"] | {"images-9": HEADER["groups"]["images-8"]}},
            "must be named 'images-8'",
        ),
        ({"groups": HEADER["groups"] | {"text-a": {"kind": "text", "encoder": "a"}}}, "'text-a': missing"),
        ({"groups": HEADER["groups"] | {"video": {"kind": "video"}}}, "'video': missing or wrong field 'format'"),
        ({"groups": HEADER["groups"] | {"../x": {"kind": "video", "format": "hdf5"}}}, "use letters, digits"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.write_manifest(tmp_path / "manifest.json", HEADER | change, [])


def test_shards_must_rise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard 1 after shard 1"):
        st.write_manifest(tmp_path / "manifest.json", HEADER, [shard(1), shard(1)])
