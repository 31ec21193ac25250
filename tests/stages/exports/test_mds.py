"""MDS files are those of mosaicml-streaming where it is installed, and hold what a sample has; `test_readers.py` reads
them with that package."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core.store import Store, StoreFolder
from stages.exports import mds, mds_files
from stages.exports.config import ExportConfig
from stages.exports.samples import open_shard
from stages.exports.selection import Selection
from stages.sources.mds.index import MdsShard
from stages.sources.mds.samples import array_of, cell_of, read_sample
from tests.commands import tree
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.store.handmade_store import make_store
from tests.stages.exports.exporting import import_streaming, skip_without

COLUMNS = {"text": "str", "number": "int", "data": "json", "array": "ndarray", "image": "jpeg", "larger": "png"}
ARRAYS = [
    *(np.arange(6).astype(dtype).reshape(2, 3) for dtype in ("uint8", "int8", "uint16", "int16", "uint32", "int32")),
    *(np.arange(6).astype(dtype) for dtype in ("uint64", "int64", "float16", "float32", "float64")),
    np.ones((255, 1), np.int8),
    np.ones((1, 256), np.int8),
    np.ones((3, 1, 65536), np.int8),
    np.arange(12, dtype=np.float32).reshape(3, 4).T,
]


def samples() -> Iterator[dict[str, Any]]:
    for number, array in enumerate(ARRAYS):
        yield {
            "text": "é" * number,
            "number": (-1) ** number * number << 40,
            "data": {"é": [number, None, 0.5]},
            "array": array,
            "image": bytes(number),
            "larger": b"\x01" * 100,
        }


def read(folder: Path) -> list[dict[str, Any]]:
    """The samples of MDS files, with the reader of this package's own source of MDS."""
    rows = []
    for entry in json.loads((folder / mds_files.INDEX).read_text())["shards"]:
        columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
        path, count = entry["raw_data"]["basename"], entry["samples"]
        assert (folder / path).stat().st_size == entry["raw_data"]["bytes"]
        shard = MdsShard(path, count, columns, tuple(entry["column_sizes"]), "")
        with (folder / path).open("rb") as file:
            for number in range(count):
                values = read_sample(file, shard, number, columns)
                rows.append({name: _decoded(data, columns[name], name) for name, data in values.items()})
    return rows


def _decoded(data: bytes, encoding: str, column: str) -> Any:
    return array_of(data, encoding) if encoding == "ndarray" else cell_of(data, encoding, column)


@pytest.mark.parametrize("limit", [1 << 26, 1000])
def test_all_that_is_written_is_read(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mds_files, "_SIZE_LIMIT", limit)
    assert mds_files.write_files(tmp_path, COLUMNS, samples()) == len(ARRAYS)
    rows = read(tmp_path)
    assert (len(list(tmp_path.glob("*.mds"))) == 1) == (limit > 1000)
    for row, sample in zip(rows, samples(), strict=True):
        array = sample.pop("array")
        found = row.pop("array")
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert row == sample


@pytest.mark.parametrize("limit", [1 << 26, 1000])
def test_the_files_are_those_of_mosaicml_streaming(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("mds")
    monkeypatch.setattr(mds_files, "_SIZE_LIMIT", limit)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for name in ("00000", "00001"):
        folder = ours / name
        folder.mkdir(parents=True)
        assert mds_files.write_files(folder, COLUMNS, samples()) == len(ARRAYS)
        writer = import_streaming("format.mds.writer").MDSWriter
        with writer(columns=COLUMNS, out=str(theirs / name), size_limit=limit) as out:
            for sample in samples():
                out.write(sample)
    indices = [(name, (ours / name / mds_files.INDEX).read_bytes()) for name in ("00000", "00001")]
    (ours / mds_files.INDEX).write_bytes(mds_files.merge_indices(indices))
    import_streaming("util").merge_index([str(theirs / name / mds_files.INDEX) for name, _ in indices], str(theirs))
    assert len(tree(ours)) > 4
    assert tree(ours) == tree(theirs)


def written(folder: Path, root: Path, shard: int) -> list[dict[str, Any]]:
    folder.mkdir()
    store = Store.open(root)
    selection = Selection.of(ExportConfig(store=str(root), to="mds"), store.manifest)
    entry = list(store.manifest.shards())[shard]
    files = {name: entry.files[name] for name in selection.groups}
    with open_shard(StoreFolder(str(root)), selection, shard, files, entry.excluded) as samples:
        mds.write_mds(folder, samples, selection, samples.max_captions)
    return read(folder)


def test_a_sample_without_a_caption_of_a_further_set_has_a_blank_one(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", shard_rows=(4, 3), sizes=(8,))
    rows_of = [[], ["one"], ["three", "drei"], ["empty", "one"]]
    sets = {"short": lambda shard, row: rows_of[row] if shard == 0 else []}
    add_caption_sets(made.path, sets, {"long": 0.8, "short": 0.2})
    store = Store.open(made.path)
    rows = written(tmp_path / "0", made.path, 0)
    for row, captions, sample in zip(rows, rows_of, store, strict=False):
        assert row["caption"] == sample.captions[0]
        assert row["num_captions"] == len(sample.captions)
        for number, name in enumerate(("caption_short", "caption_short_1")):
            caption = captions[number] if number < len(captions) else ""
            latent, mask = row[f"latent_{name}_t5"], row[f"attention_mask_{name}_t5"]
            assert row[name] == caption
            if caption in ("", "empty"):
                assert np.isnan(latent).all()
                assert (latent.shape[0], mask.sum()) == (1, 0)
            else:
                assert latent.tobytes() == sample.set_texts["short"]["t5"][number].tobytes()
                assert mask.sum() == 2
        assert "caption_short_2" not in row
    assert len(rows) == 4
    for row in written(tmp_path / "1", made.path, 1):
        assert (row["caption_short"], row["attention_mask_caption_short_t5"].sum()) == ("", 0)
        assert "caption_short_1" not in row
