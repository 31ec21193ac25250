"""What the loader gives back from a store equals what the pipelines of diffusers hand to their networks."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

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

OTHER_NULL = {"prx-pixel": "its pipeline gives the empty caption no row at all"}


def run(name: str, model: Path, folder: Path) -> Store:
    """A float32 store of the captions by one recipe."""
    pq.write_table(pa.table({"caption": list(CAPTIONS)}), folder / "captions.parquet")
    settings: dict[str, Any] = {
        "source": {"kind": "parquet", "path": str(folder / "captions.parquet"), "image_column": None},
        "images": {"sizes_px": []},
        "store": {"dtype": "float32"},
        "encoders": [CASES[name].config(name, model)],
    }
    Precompute(load_config(PrecomputeConfig, settings)).run(folder / "run", RunOptions("inline", quiet=True))
    return Store.open(folder / "run" / "store")


def assert_equal(found: Rows, expected: Rows) -> None:
    """Equal to 1e-5 of the largest value, as some states are scaled by the square root of their width."""
    assert [rows.shape for rows in found] == [rows.shape for rows in expected]
    scale = max(1.0, *(float(np.abs(rows).max()) for rows in expected))
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) <= 1e-5 * scale


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("ftfy", "bs4"):
        pytest.importorskip(package)
    return tiny_models.write(CASES[name].make, tmp_path_factory.mktemp("models") / name)


def test_twenty_recipes_and_more_are_compared() -> None:
    assert len(CASES) >= 20
    assert recipes().keys() - CASES.keys() == {"sd3-clip-g"}, "which has the settings of sd3-clip-l"


def test_pipelines_whose_batches_change_captions_are_given_one_a_call() -> None:
    assert {name for name, case in CASES.items() if case.alone} == {"mochi", "cogview4", "fibo"}
    given: list[list[str]] = []
    spy: Any = replace(CASES["fibo"], reference=lambda model, tokenizer, captions: given.append(captions) or [])
    with patch("transformers.AutoTokenizer.from_pretrained"), patch("transformers.AutoModel.from_pretrained"):
        spy.expected(Path("nowhere"), CAPTIONS[:3])
    assert given == [[caption] for caption in CAPTIONS[:3]]


@pytest.mark.slow
def test_a_store_holds_what_the_pipeline_hands_to_its_network(name: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    case, store = CASES[name], run(name, model, tmp_path)
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


@pytest.mark.slow
def test_no_caption_depends_on_the_others_of_its_batch(name: str, model: Path) -> None:
    settings = {**CASES[name].config(name, model), "tokens_per_batch": 10**6}
    encoder = load_encoder(TypeAdapter(AnyEncoder).validate_python(settings), 1)
    captions = [*CAPTIONS, "", "two words"]
    longest, shortest = CAPTIONS[2], "two"
    alone = [encoder.encode([caption]).embeddings[0] for caption in captions]
    assert_equal(encoder.encode(captions).embeddings, alone)
    assert_equal(encoder.encode(captions[::-1]).embeddings[::-1], alone)
    for other in (longest, shortest):
        assert_equal([encoder.encode([other, caption]).embeddings[1] for caption in captions], alone)
