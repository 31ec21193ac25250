"""The encode stage: several captions, equal captions, and embeddings that do not fit the store."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers import T5Config, T5EncoderModel

from imagen_core.store import Store, verify_store
from pipeline.config import load_config
from pipeline.errors import PipelineError, StaleOutputError
from pipeline.options import RunOptions
from pipeline.storage.run_folder import RunFolder
from stages.browse.report import report_command
from stages.encoders.base import Encoded
from stages.encoders.encoder import TextEncoder
from stages.encoders.packed.t5 import PackedT5
from stages.encoders.t5 import T5EncoderConfig
from stages.encoders.tiny import TINY_MODEL, write_tiny_model
from stages.precompute.encode_text import EncodeStage
from stages.store_tools.reencode import reencode
from tests.runs import precompute, store_bytes
from tests.stages.encoders import tiny_models
from tests.stages.precompute.test_resize import png
from tests.word_tokenizer import write_word_tokenizer
from workflows.precompute import Precompute, PrecomputeConfig


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    captions = {"a": "a red circle", "b": "a red circle\na blue square", "c": "a blue square\n\nboom"}
    for name, text in captions.items():
        (folder / f"{name}.png").write_bytes(png(32, 50))
        (folder / f"{name}.txt").write_text(text)
    return folder


def folder_of(path: Path) -> list[str]:
    return ["source.kind=folder", f"source.path={path}", "images.sizes_px=[16]"]


def run(out: Path, folder: Path, *more: str) -> dict[str, object]:
    return precompute(out, *folder_of(folder), *more)


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


# ---- the encoder's identity ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "small"
    folder.parent.mkdir()
    write_tiny_model(folder)
    return folder


def encoder_of(model: Path, **changes: object) -> str:
    settings = {"name": "t5", "kind": "t5", "model": str(model), "compute_dtype": "float32", **changes}
    return f"encoders={json.dumps([settings])}"


def forget(out: Path) -> None:
    """Removes the only shard of text, so that the next run encodes it again."""
    (out / "state" / "text-t5" / "00000.json").unlink()


def test_a_changed_config_of_the_model_is_refused_by_field(captioned: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, captioned, encoder_of(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    before = store_bytes(out)
    with pytest.raises(
        StaleOutputError, match=r"text-t5\.fingerprint\.model_config\.layer_norm_epsilon: \(absent\) -> 0"
    ):
        run(out, captioned, encoder_of(model))
    assert store_bytes(out) == before
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    summary = run(out, captioned, encoder_of(model))
    assert summary["tally"]["shards_skipped"] == 1  # type: ignore[index]


def test_a_resumed_run_refuses_an_encoder_with_other_numbers(
    captioned: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(out, captioned, encoder_of(model))
    before = store_bytes(out)
    forget(out)
    honest = PackedT5.__call__
    monkeypatch.setattr(PackedT5, "__call__", lambda self, ids, lengths: honest(self, ids, lengths).roll(1, dims=1))
    with pytest.raises(PipelineError, match=r"encoders\.t5: .*null\.safetensors: the encoding of \"\" differs by"):
        run(out, captioned, encoder_of(model))
    monkeypatch.setattr(
        PackedT5, "__call__", lambda self, ids, lengths: honest(self, ids, lengths) * (1.1 if len(ids) > 1 else 1)
    )
    with pytest.raises(PipelineError, match=r"encoders\.t5: the same model gives other numbers.*probe: 'A red square"):
        run(out, captioned, encoder_of(model))
    monkeypatch.undo()
    moved = model.rename(tmp_path / "small")
    run(out, captioned, encoder_of(moved, tokens_per_batch=7, cpu_threads=1))
    assert store_bytes(out) == before


def test_the_manifest_says_with_what_the_embeddings_were_made(captioned: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", captioned)
    store = Store.open(tmp_path / "run" / "store")
    probe = store.probe("t5")
    assert probe is not None
    assert probe["environment"] == store.manifest.header["groups"]["text-t5"]["probe"]["environment"]
    assert probe["environment"]["transformers"] == transformers.__version__
    assert set(probe["environment"]) == {"torch", "transformers", "tokenizers", "attention", "device"}
    (tmp_path / "run" / "store" / "text-t5" / "probe.json").write_text("{}")
    report = verify_store(tmp_path / "run" / "store")
    assert {problem.file for problem in report.problems} == {"text-t5/probe.json"}


def test_encoding_again_compares_the_probe(
    captioned: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run", captioned, encoder_of(model))
    store = Store.open(tmp_path / "run" / "store")
    honest = reencode(store, 1.0, seed=0, models={"t5": str(model)})["t5"]
    assert (honest.probe, honest.problems) == ("agrees", [])
    kept = TextEncoder.encode

    def other(self: TextEncoder, captions: list[str]) -> Encoded:
        encoded = kept(self, captions)
        for caption, embedding in zip(captions, encoded.embeddings, strict=True):
            embedding *= 1.1 if "北京" in caption else 1.0
        return encoded

    monkeypatch.setattr(TextEncoder, "encode", other)
    found = reencode(store, 1.0, seed=0, models={"t5": str(model)})["t5"]
    assert found.probe == "differs"
    assert [problem.file for problem in found.problems] == ["text-t5/probe.json"]


# ---- tokens ----


def test_unknown_tokens_are_counted_shown_and_warned_about(captioned: Path, tmp_path: Path) -> None:
    write_word_tokenizer(tmp_path / "bert", template="$A </s>")
    state = json.loads((tmp_path / "bert" / "tokenizer.json").read_text())
    state["model"]["byte_fallback"] = False
    (tmp_path / "bert" / "tokenizer.json").write_text(json.dumps(state))
    T5EncoderModel(T5Config(vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "bert"
    )
    (captioned / "a.txt").write_text("猫 猫 猫")
    out = tmp_path / "run"
    workflow = Precompute(load_config(PrecomputeConfig, None, [*folder_of(captioned), encoder_of(tmp_path / "bert")]))
    summary = workflow.run(out, RunOptions("inline", quiet=True))
    counters = summary["tally"]["groups"]["text-t5"]["counters"]
    assert counters["unk_tokens"] == 3
    lines = dict(workflow.next_steps(RunFolder(str(out))))
    assert lines["text-t5"].startswith(f"3 of {counters['tokens']} tokens are unknown to the tokenizer (")
    assert "warning: captions that differ in such text look the same" in lines["text-t5"]
    page, _, _ = report_command(out)
    assert "unknown tokens" in Path(str(page["report"])).read_text()
    assert page["losses"]["text-t5"]["unk_share"] == 3 / counters["tokens"]  # type: ignore[index]


def test_a_caption_of_which_the_tokenizer_leaves_nothing_is_a_counted_drop(captioned: Path, tmp_path: Path) -> None:
    folder = tiny_models.write(tiny_models.bare_llama, tmp_path / "lm")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": "boom"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (captioned / "c.txt").write_text("boom")
    summary = run(tmp_path / "run", captioned, encoder_of(folder, kind="auto"))
    group = summary["tally"]["groups"]["text-t5"]  # type: ignore[index]
    assert group["drops"] == {"no_tokens": 1}
    store = Store.open(tmp_path / "run" / "store")
    assert [s.key for s in store] == ["a.png", "b.png"]
    assert store.null("t5").shape == (1, 24)
    assert verify_store(tmp_path / "run" / "store").ok


def test_the_work_of_a_set_that_is_added_is_that_of_its_captions() -> None:
    encoder, rows = T5EncoderConfig(name="t5", model=TINY_MODEL), [("a red circle",), ("two words",)]
    further = {"short": [("red",), ()]}
    stage = EncodeStage(encoder, "parquet", "float16", caption_sets=["short"])
    both, first = stage.workload(rows, further), EncodeStage(encoder, "parquet", "float16").workload(rows)
    short = EncodeStage(encoder, "parquet", "float16").workload(further["short"])
    assert both.units == first.units + short.units
    added = stage.workload(rows, further, {"text-t5-short", "samples"})
    assert (added.units, added.flops) == (short.units, short.flops)
    assert added.bytes == both.bytes == {"text-t5": first.bytes["text-t5"], "text-t5-short": short.bytes["text-t5"]}
