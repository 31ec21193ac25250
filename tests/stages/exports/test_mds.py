"""What is handed to MDS's writer; `test_readers.py` reads the files with mosaicml-streaming where it is installed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest

from imagen_core.store import Store, StoreFolder
from stages.exports import mds
from stages.exports.config import ExportConfig
from stages.exports.samples import open_shard
from stages.exports.selection import Selection
from tests.imagen_core.store.caption_sets_added import add_caption_sets
from tests.imagen_core.store.handmade_store import make_store

ENCODINGS = {"str": str, "int": int, "ndarray": np.ndarray, "json": dict, "png": bytes}


class Writer:
    """Takes samples as `MDSWriter` does: with the columns that were declared, all of them."""

    rows: list[dict[str, Any]]

    def __init__(self, columns: dict[str, str], **_: object):
        self.columns = columns
        Writer.rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, sample: dict[str, Any]) -> None:
        assert sample.keys() == self.columns.keys()
        assert all(isinstance(sample[name], ENCODINGS[kind]) for name, kind in self.columns.items())
        assert all(value.size for value in sample.values() if isinstance(value, np.ndarray))
        self.rows.append(sample)


def written(monkeypatch: pytest.MonkeyPatch, root: Path, shard: int) -> list[dict[str, Any]]:
    monkeypatch.setattr(mds, "import_streaming", lambda _: SimpleNamespace(MDSWriter=Writer))
    store = Store.open(root)
    selection = Selection.of(ExportConfig(store=str(root), to="mds"), store.manifest)
    entry = list(store.manifest.shards())[shard]
    files = {name: entry.files[name] for name in selection.groups}
    with open_shard(StoreFolder(str(root)), selection, shard, files, entry.excluded) as samples:
        mds.write_mds(root, samples, selection, samples.max_captions)
    return Writer.rows


def test_a_sample_without_a_caption_of_a_further_set_has_a_blank_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(tmp_path / "store", shard_rows=(4, 3), sizes=(8,))
    rows_of = [[], ["one"], ["three", "drei"], ["empty", "one"]]
    sets = {"short": lambda shard, row: rows_of[row] if shard == 0 else []}
    add_caption_sets(made.path, sets, {"long": 0.8, "short": 0.2})
    store = Store.open(made.path)
    rows = written(monkeypatch, made.path, 0)
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
    for row in written(monkeypatch, made.path, 1):
        assert (row["caption_short"], row["attention_mask_caption_short_t5"].sum()) == ("", 0)
        assert "caption_short_1" not in row
