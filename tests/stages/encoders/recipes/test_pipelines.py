"""What the loader gives back from a store equals what the pipelines of diffusers hand to their networks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from imagen_core.store import Store
from pipeline.config import load_config
from pipeline.options import RunOptions
from stages.encoders.encoder import load_encoder
from stages.encoders.recipes.shipped import recipes
from stages.encoders.registry import AnyEncoder
from tests.stages.encoders import tiny_models
from tests.stages.encoders.recipes.pipelines import CAPTIONS, CASES, Rows
from workflows.precompute import Precompute, PrecomputeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
OTHER_NULL = {"prx-pixel": "its pipeline gives the empty caption no row at all"}


@dataclass(frozen=True)
class Made:
    """A float32 store with every recipe as an encoder, and the models' folders."""

    store: Store
    models: dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    for package in ("diffusers", "ftfy", "bs4"):
        pytest.importorskip(package)
    parent = tmp_path_factory.mktemp("recipes")
    models = {name: tiny_models.write(case.make, parent / name) for name, case in CASES.items()}
    pq.write_table(pa.table({"caption": list(CAPTIONS)}), parent / "captions.parquet")
    settings: dict[str, Any] = {
        "source": {"kind": "parquet", "path": str(parent / "captions.parquet"), "image_column": None},
        "images": {"sizes_px": []},
        "store": {"dtype": "float32"},
        "encoders": [case.config(name, models[name]) for name, case in CASES.items()],
    }
    Precompute(load_config(PrecomputeConfig, settings)).run(parent / "run", RunOptions("inline", quiet=True))
    return Made(Store.open(parent / "run" / "store"), models)


def assert_equal(found: Rows, expected: Rows) -> None:
    """Equal to 1e-5 of the largest value, as some states are scaled by the square root of their width."""
    assert [rows.shape for rows in found] == [rows.shape for rows in expected]
    scale = max(1.0, *(float(np.abs(rows).max()) for rows in expected))
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) <= 1e-5 * scale


def test_twenty_recipes_and_more_are_compared() -> None:
    assert len(CASES) >= 20
    assert recipes().keys() - CASES.keys() == {"sd3-clip-g"}, "which has the settings of sd3-clip-l"


@pytest.mark.parametrize("name", CASES)
def test_the_loader_gives_what_the_pipeline_gives(name: str, made: Made) -> None:
    (batch,) = made.store.loader(batch_size=len(CAPTIONS), text=name, captions=True, shuffle=False)
    captions, found = batch["captions"], batch["text"].numpy()
    kept = [rows[mask] for rows, mask in zip(found, batch["text_mask"].numpy(), strict=True)]
    assert_equal(kept, CASES[name].expected(made.models[name], captions))


@pytest.mark.parametrize("name", CASES)
def test_the_empty_caption_is_the_pipelines_own(name: str, made: Made) -> None:
    if name in OTHER_NULL:
        assert len(made.store.null(name)) == 1, OTHER_NULL[name]
        return
    assert_equal([made.store.null(name)], CASES[name].expected(made.models[name], [""]))


@pytest.mark.parametrize("name", CASES)
def test_no_caption_depends_on_its_batch(name: str, made: Made) -> None:
    config = TypeAdapter(AnyEncoder).validate_python(CASES[name].config(name, made.models[name]))
    encoder = load_encoder(config, 1)
    alone = [encoder.encode([caption]).embeddings[0] for caption in CAPTIONS]
    mixed = encoder.encode([*reversed(CAPTIONS), *["other words"] * 5]).embeddings[: len(CAPTIONS)]
    assert_equal(mixed[::-1], alone)
