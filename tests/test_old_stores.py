"""Stores that version 0.1.0 wrote (tests/fixtures/stores_0_1, with the script that made them) are still good."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core.store import Store, verify_store
from imagen_core.train import train
from stages.store_tools.reencode import reencode
from tests.imagen_core.train.small import BASE, make_config
from tests.runs import precompute, store_bytes

FOLDER = Path(__file__).parent / "fixtures" / "stores_0_1"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
STORES = {"parquet": FOLDER / "parquet", "hdf5": FOLDER / "hdf5", "run": FOLDER / "run" / "store"}


def digest(array: np.ndarray) -> str:
    """Type, shape and bytes, as the script that made the stores writes them down."""
    return f"{array.dtype} {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"


@pytest.mark.parametrize("name", STORES)
def test_an_old_store_reads_as_the_code_that_wrote_it_read_it(name: str) -> None:
    store, expected = Store.open(STORES[name]), EXPECTED[name]
    assert len(store) == len(expected["samples"]) == (10 if name == "hdf5" else 11)
    assert digest(store.null("t5")) == expected["null"]
    for sample, known in zip(store, expected["samples"], strict=True):
        assert [sample.key, sample.captions, sample.url] == [known["key"], known["captions"], known["url"]]
        assert [sample.sha256, [sample.width, sample.height]] == [known["sha256"], known["size"]]
        assert {str(size): digest(pixels) for size, pixels in sample.images.items()} == known["images"]
        assert [digest(embedding) for embedding in sample.text["t5"]] == known["text"]


@pytest.mark.parametrize("name", STORES)
def test_an_old_store_verifies(name: str) -> None:
    report = verify_store(STORES[name])
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
def test_an_old_store_trains(name: str, tmp_path: Path) -> None:
    denoiser = BASE | {"unet": BASE["unet"] | {"text_dim": 64}}
    config = make_config(STORES[name], denoiser=denoiser, num_steps=2, batch_size=4)
    summary = train(config, tmp_path)
    assert summary["steps"] == 2
    assert np.isfinite(summary["loss"])


def test_an_old_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    """Its rows, stages and configurations have the fingerprints that they had."""
    out = shutil.copytree(FOLDER / "run", tmp_path / "run")
    before = store_bytes(out)
    settings = ["source.num_samples=12", "shard_size=5", "images.sizes_px=[16,32]"]
    summary = precompute(out, *settings)
    assert summary["tally"]["shards_skipped"] == 3
    assert store_bytes(out) == before


def test_an_old_run_goes_on_with_the_identity_that_it_recorded(tmp_path: Path) -> None:
    """What its version did not record is not compared, and is not claimed for its files."""
    out = shutil.copytree(FOLDER / "run", tmp_path / "run")
    before = {name: data for name, data in store_bytes(out).items() if name != "manifest.json"}
    (out / "state" / "text-t5" / "00001.json").unlink()
    precompute(out, "source.num_samples=12", "shard_size=5", "images.sizes_px=[16,32]")
    after = {name: data for name, data in store_bytes(out).items() if name != "manifest.json"}
    made_again = "text-t5/00001.parquet"  # perhaps on another processor, so with other last bits of bfloat16
    del after[made_again], before[made_again]
    assert after == before
    store = Store.open(out / "store")
    for found, known in zip(store, Store.open(STORES["run"]), strict=True):
        for rows, expected in zip(found.text["t5"], known.text["t5"], strict=True):
            np.testing.assert_allclose(rows, expected, atol=2e-2, rtol=2e-2)
    assert store.probe("t5") is None
    assert not {"model_config", "tokenizer"} & store.text_group("t5").fingerprint.keys()
    assert verify_store(out / "store").ok
    found = reencode(store, 1.0, seed=0, models={})["t5"]
    assert (found.probe, found.problems) == ("not recorded", [])
