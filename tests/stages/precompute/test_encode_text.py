"""The encode stage: several captions, equal captions, and embeddings that do not fit the store."""

import json
from pathlib import Path

import numpy as np
import pytest

from imagen_core.store import Store, verify_store
from pipeline.errors import StaleOutputError
from stages.encoders.base import Encoded
from stages.encoders.encoder import TextEncoder
from stages.store_tools.report import report_command
from tests.runs import precompute
from tests.stages.precompute.test_resize import png


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    captions = {"a": "a red circle", "b": "a red circle\na blue square", "c": "a blue square\n\nboom"}
    for name, text in captions.items():
        (folder / f"{name}.png").write_bytes(png(32, 50))
        (folder / f"{name}.txt").write_text(text)
    return folder


def run(out: Path, folder: Path, *more: str) -> dict[str, object]:
    return precompute(out, "source.kind=folder", f"source.path={folder}", "images.sizes_px=[16]", *more)


def test_equal_captions_are_encoded_once_and_several_captions_are_kept(captioned: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", captioned)
    counters = summary["tally"]["groups"]["text-t5"]["counters"]  # type: ignore[index]
    assert counters["captions_encoded"] == 3
    store = Store.open(tmp_path / "run" / "store")
    assert [s.captions for s in store] == [
        ["a red circle"],
        ["a red circle", "a blue square"],
        ["a blue square", "boom"],
    ]
    assert np.array_equal(store[0].text["t5"][0], store[1].text["t5"][0])
    assert np.array_equal(store[1].text["t5"][1], store[2].text["t5"][0])


def test_the_null_embedding_is_the_encoding_of_the_empty_caption(captioned: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", captioned, "store.dtype=float32", "encoders.0.compute_dtype=float32")
    (tmp_path / "words").mkdir()
    null = Store.open(tmp_path / "run" / "store").null("t5")
    assert null.shape == (1, 64), "only the end of the sequence"
    assert np.isfinite(null).all()
    assert np.abs(null).max() > 0


def test_a_sample_whose_embedding_is_not_finite_is_excluded_and_counted(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TextEncoder.encode

    def overflowing(self: TextEncoder, captions: list[str]) -> Encoded:
        encoded = honest(self, captions)
        for caption, embedding in zip(captions, encoded.embeddings, strict=True):
            if caption == "boom":
                embedding[0, 0] = 70_000.0  # finite as float32, infinite as float16
        return encoded

    monkeypatch.setattr(TextEncoder, "encode", overflowing)
    summary = run(tmp_path / "run", captioned)
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {"non_finite_embedding": 1}  # type: ignore[index]
    assert summary["num_samples"] == 2
    store = Store.open(tmp_path / "run" / "store")
    assert [s.key for s in store] == ["a.png", "b.png"]
    assert verify_store(tmp_path / "run" / "store").ok
    wide = run(tmp_path / "wide", captioned, "store.dtype=bfloat16")
    assert wide["num_samples"] == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 1e-2), ("int8", 1e-2)])
def test_every_store_dtype_is_close_to_float32(captioned: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    run(tmp_path / "exact", captioned, "store.dtype=float32")
    run(tmp_path / "run", captioned, f"store.dtype={dtype}")
    for a, b in zip(Store.open(tmp_path / "exact" / "store"), Store.open(tmp_path / "run" / "store"), strict=True):
        for exact, stored in zip(a.text["t5"], b.text["t5"], strict=True):
            error = np.abs(stored.astype(np.float32) - exact).max(axis=1)
            assert (error <= tolerance * np.abs(exact).max(axis=1)).all()


def test_a_caption_that_int8_spoils_is_dropped_with_its_error_and_the_others_are_measured(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TextEncoder.encode

    def spiked(self: TextEncoder, captions: list[str]) -> Encoded:
        encoded = honest(self, captions)
        for caption, embedding in zip(captions, encoded.embeddings, strict=True):
            if caption == "boom":
                embedding[-1, 0] = 12.0 * np.abs(embedding[-1]).max()
        return encoded

    monkeypatch.setattr(TextEncoder, "encode", spiked)
    out = tmp_path / "run"
    summary = run(out, captioned, "store.dtype=int8", "store.min_cosine=0.9999")
    group = summary["tally"]["groups"]["text-t5"]  # type: ignore[index]
    assert group["drops"] == {"quantisation_error": 1}
    (drop,) = [json.loads(line) for line in (out / "quarantine" / "text-t5" / "00000.jsonl").read_text().splitlines()]
    assert (drop["key"], drop["reason"]) == ("c.png", "quantisation_error")
    assert drop["detail"].startswith("cosine 0.999")
    report = verify_store(out / "store")
    assert (report.ok, report.num_samples, report.excluded) == (True, 2, {"quantisation_error": 1})
    record = json.loads((out / "state" / "text-t5" / "00000.json").read_text())
    counters, info = record["counters"], record["info"]
    assert counters["int8_tokens"] == counters["tokens"] > 0
    assert info["mean_cosine"] == pytest.approx(counters["int8_cosine_sum"] / counters["tokens"])
    assert 0.9999 <= info["min_cosine"] == counters["int8_cosine_min"] <= info["mean_cosine"] <= 1
    assert 0 < info["mean_relative_error"] <= info["max_relative_error"] < 0.015
    assert Store.open(out / "store").manifest.header["groups"]["text-t5"]["min_cosine"] == 0.9999
    page, _, _ = report_command(out)
    assert "Rounding to int8" in Path(str(page["report"])).read_text()
    monkeypatch.undo()
    lenient = run(tmp_path / "lenient", captioned, "store.dtype=int8")
    assert lenient["num_samples"] == 3
    with pytest.raises(StaleOutputError, match=r"text-t5\.min_cosine: 0\.9999 -> 0\.99"):
        run(out, captioned, "store.dtype=int8")
