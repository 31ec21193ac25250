"""What the loader gives back from a store equals what the pipelines of diffusers hand to their networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import Store
from pipeline.config import load_config
from pipeline.options import RunOptions
from stages.encoders.encoder import load_encoder
from stages.encoders.recipes.shipped import recipes
from tests.stages.encoders import tiny_models
from tests.stages.encoders.recipes.pipelines import CAPTIONS, CASES, Rows
from workflows.precompute import Precompute, PrecomputeConfig

OTHER_NULL = {"prx-pixel": "its pipeline gives the empty caption no row at all"}


def run(name: str, model: Path, folder: Path) -> tuple[Precompute, Store]:
    """A float32 store of the captions by one recipe."""
    pq.write_table(pa.table({"caption": list(CAPTIONS)}), folder / "captions.parquet")
    settings: dict[str, Any] = {
        "source": {"kind": "parquet", "path": str(folder / "captions.parquet"), "image_column": None},
        "images": {"sizes_px": []},
        "store": {"dtype": "float32"},
        "encoders": [CASES[name].config(name, model)],
    }
    workflow = Precompute(load_config(PrecomputeConfig, settings))
    workflow.run(folder / "run", RunOptions("inline", quiet=True))
    return workflow, Store.open(folder / "run" / "store")


def assert_equal(found: Rows, expected: Rows) -> None:
    """Equal to 1e-5 of the largest value, as some states are scaled by the square root of their width."""
    assert [rows.shape for rows in found] == [rows.shape for rows in expected]
    scale = max(1.0, *(float(np.abs(rows).max()) for rows in expected))
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) <= 1e-5 * scale


def test_twenty_recipes_and_more_are_compared() -> None:
    assert len(CASES) >= 20
    assert recipes().keys() - CASES.keys() == {"sd3-clip-g"}, "which has the settings of sd3-clip-l"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_store_holds_what_the_pipeline_hands_to_its_network(name: str, tmp_path: Path) -> None:
    for package in ("diffusers", "ftfy", "bs4"):
        pytest.importorskip(package)
    case, model = CASES[name], tiny_models.write(CASES[name].make, tmp_path / "model")
    workflow, store = run(name, model, tmp_path)
    (batch,) = store.loader(batch_size=len(CAPTIONS), text=name, captions=True, shuffle=False)
    assert batch["captions"] == list(CAPTIONS)
    text = batch["text"].flatten(2).numpy()  # of stacked layers too: layer after layer
    kept = [rows[mask] for rows, mask in zip(text, batch["text_mask"].numpy(), strict=True)]
    assert_equal(kept, case.expected(model, CAPTIONS))
    if name in OTHER_NULL:
        assert len(store.null(name)) == 1, OTHER_NULL[name]
    else:
        null = store.null(name)
        assert_equal([null.reshape(len(null), -1)], case.expected(model, [""]))
    encoder = load_encoder(workflow.config.encoders[0], 1)  # type: ignore[arg-type]
    alone = [encoder.encode([caption]).embeddings[0] for caption in CAPTIONS[:2]]
    assert_equal(alone, kept[:2])  # whatever else was in the batch
