"""A run with `source.where`: filtered rows are in no shard, and the run, the manifest and `verify` count them."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("sqlglot")

from imagen_core.store import Store
from pipeline.errors import StaleOutputError
from tests.commands import call
from tests.images import plain_png
from tests.runs import precompute

SIZE = ("images.sizes_px=[8]", "encoders=[]", "shard_size=2")


def test_filtered_rows_are_counted_by_the_run_the_manifest_and_verify(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    rows = [{"image": plain_png(), "caption": f"{i}", "score": None if i == 3 else float(i)} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    os.utime(path, (0, 0))
    source = ("source.kind=parquet", f"source.path={path}", *SIZE)
    for _ in ("first start", "from the notes"):
        summary = precompute(tmp_path / "run", *source, "source.where=score >= 2")
        assert (summary["num_samples"], summary["filtered"], summary["tally"]["input_rows"]) == (5, 3, 5)
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.captions[0] for sample in store] == ["2", "4", "5", "6", "7"]
    assert store.manifest.filtered == 3
    verified = call("verify", str(tmp_path / "run"))
    assert verified.code == 0
    assert "5 input rows: 5 samples, 0 dropped, 0 excluded, 0 unaccounted; 3 other rows filtered by" in verified.out
    assert json.loads(call("verify", str(tmp_path / "run"), "--json").out)["filtered"] == 3
    report = json.loads(call("report", str(tmp_path / "run"), "--json").out)
    assert report["filtered"] == 3
    assert "5 input rows, 3 others filtered by source.where" in Path(report["report"]).read_text()
    assert "3 rows of the source were filtered by source.where" in call("inspect", str(tmp_path / "run")).out
    assert "3 other rows of the source were filtered by source.where" in call("status", str(tmp_path / "run")).out
    with pytest.raises(StaleOutputError, match="was made from other input rows"):
        precompute(tmp_path / "run", *source, "source.where=score >= 3")
