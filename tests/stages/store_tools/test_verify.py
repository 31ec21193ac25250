"""`pipeline verify` on what a run made: the fate of every input row, and the captions encoded again."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from imagen_core import store as st
from pipeline.errors import ShardError, StaleOutputError
from pipeline.fingerprint import digest
from pipeline.stage import Task
from pipeline.storage.run_folder import RunFolder
from stages.encoders.encoder import load_encoder
from stages.encoders.tiny import write_tiny_model
from stages.precompute.resize import ResizeStage
from tests.commands import Result, call
from tests.runs import SMALL, precompute

TEXT = "text-t5/00001.parquet"


def verified(path: Path, *options: str) -> tuple[Result, dict[str, Any]]:
    result = call("verify", str(path), "--json", *options)
    return result, json.loads(result.out or "{}")


def test_verify_tells_the_fate_of_every_input_row_without_the_run_folder(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "store", tmp_path / "copied")
    _, found = verified(tmp_path / "copied")
    counts = [found[name] for name in ("input_rows", "num_samples", "dropped", "excluded", "unaccounted")]
    assert counts == [20, 19, {"http_404": 1}, {}, 0]
    lines = call("verify", str(tmp_path / "copied")).out.splitlines()
    assert lines[0] == "20 input rows: 19 samples, 1 dropped (http_404 1), 0 excluded, 0 unaccounted"
    samples = st.read_samples(tmp_path / "copied" / "samples" / "00000.parquet")
    assert [sample.input_row for sample in samples] == [0, 1, 3, 4, 5, 6, 7]


def test_a_shard_that_failed_leaves_its_rows_unaccounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ResizeStage.process

    def failing(self: ResizeStage, task: Task) -> None:
        if task.shard.index == 2:
            raise RuntimeError("broken")
        honest(self, task)

    monkeypatch.setattr(ResizeStage, "process", failing)
    with pytest.raises(ShardError):
        precompute(tmp_path / "run", *SMALL, "execution.max_attempts=1")
    result, found = verified(tmp_path / "run")
    assert (result.code, found["input_rows"], found["num_samples"], found["unaccounted"]) == (1, 20, 15, 4)
    assert [problem["file"] for problem in found["problems"]] == ["manifest.json"]


def test_a_row_the_source_loses_on_the_way_is_an_error_and_not_a_sample_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.precompute.originals import OriginalsReader

    honest = OriginalsReader.__init__

    def losing(self: OriginalsReader, path: Path) -> None:
        honest(self, path)
        del self.entries[1]

    monkeypatch.setattr(OriginalsReader, "__init__", losing)
    with pytest.raises(ShardError, match=r"input rows \[1\] of 8: each must be one sample, or dropped"):
        precompute(tmp_path / "run", *SMALL, "execution.max_attempts=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and beside it `other/model`, of the same name and tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("models") / "model"
    write_tiny_model(folder)
    other = folder.parent / "other" / "model"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    weights["shared.weight"] = np.roll(weights["shared.weight"], 1, axis=0)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def encoded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with that model; tests must not change it."""
    out = tmp_path_factory.mktemp("encoded") / "run"
    precompute(out, *SMALL[:2], "images.sizes_px=[16]", f"encoders=[{{name: t5, model: {model}}}]")
    return out


@pytest.fixture
def store(encoded: Path, model: Path, tmp_path: Path) -> Path:
    shutil.copytree(encoded / "store", tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.slow
def test_captions_are_chosen_by_the_seed_alone_and_agree(store: Path, model: Path) -> None:
    arguments = ("--encoder-model", f"t5={model}", "--reencode")
    few, all_of_them = verified(store, *arguments, "0")[1], verified(store, *arguments, "1")[1]
    again = verified(store, *arguments, "0")[1]
    assert few["ok"]
    assert few["reencoded"] == again["reencoded"]
    assert few["reencoded"]["t5"]["captions"] == 2, "one, and the empty one of the null embedding"
    shards = [st.read_samples(path) for path in (store / "samples").iterdir()]
    distinct = sum(len({caption for sample in shard for caption in sample.captions}) for shard in shards)
    assert all_of_them["reencoded"]["t5"]["captions"] == distinct + 1
    others = [verified(store, *arguments, "0", "--seed", str(seed))[1]["reencoded"] for seed in (1, 2, 3)]
    assert any(other != few["reencoded"] for other in others), "another seed takes another caption"
    found = all_of_them["reencoded"]["t5"]
    assert 0.9999 < found["min_cosine"] <= found["mean_cosine"] <= 1
    assert found["max_relative_error"] < found["tolerance"] == pytest.approx(0.051)
    assert found["max_absolute_error"] < 0.05


def rewrite(store: Path, change: Any) -> list[str]:
    """Writes the shard's embeddings again after `change`, and everything else to match; the captions."""
    raw = json.loads((store / "manifest.json").read_bytes())
    group = raw["groups"]["text-t5"]
    opened = st.Store.open(store)
    samples = st.read_samples(store / "samples" / "00001.parquet")
    by_id = {i: c for sample in samples for i, c in zip(sample.caption_ids, sample.captions, strict=True)}
    captions = [by_id[i] for i in range(len(by_id))]
    file = opened.shard(1).text["t5"]
    embeddings = change(captions, [st.restore(file.stored(i), "float16") for i in range(len(captions))])
    st.write_embedding_shard(
        store / TEXT,
        st.cast_embeddings([e.astype(np.float32) for e in embeddings], group["dim"], group["dtype"]),
        [len(e) for e in embeddings],
        group["dim"],
        group["dtype"],
        "parquet",
        captions=captions,
        fingerprint=group["fingerprint"],
    )
    data = (store / TEXT).read_bytes()
    entry = {"path": TEXT, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": len(captions)}
    raw["shards"][1]["files"]["text-t5"] = entry
    header = {name: raw[name] for name in ("writer", "input_rows", "groups")}
    st.write_manifest(store / "manifest.json", header, raw["shards"])
    assert verified(store)[1]["ok"], "nothing but the model can tell"
    return captions


def test_embeddings_of_another_model_are_found_by_encoding_again(store: Path, model: Path) -> None:
    from stages.encoders.t5 import T5EncoderConfig

    other = T5EncoderConfig(name="t5", model=str(model.parent / "other" / "model"), num_gpus=0)
    captions = rewrite(store, lambda captions, _: load_encoder(other, 1).encode(captions).embeddings)
    result, found = verified(store, "--reencode", "1", "--encoder-model", f"t5={model}")
    assert result.code == 1
    assert {problem["file"] for problem in found["problems"]} == {TEXT}
    assert sorted(problem["message"].split("'")[1] for problem in found["problems"]) == sorted(captions)
    assert "a token differs by" in found["problems"][0]["message"]
    assert found["reencoded"]["t5"]["min_cosine"] < 0.99


def test_a_missing_token_is_found_by_encoding_again(store: Path, model: Path) -> None:
    captions = rewrite(store, lambda _, embeddings: [embeddings[0][:-1], *embeddings[1:]])
    result, found = verified(store, "--reencode", "1", "--encoder-model", f"t5={model}")
    (problem,) = found["problems"]
    assert (result.code, problem["file"]) == (1, TEXT)
    tokens = len(captions[0].split()) + 1
    assert problem["message"] == (
        f"caption {captions[0]!r}: {tokens - 1} tokens of 64 stored, {tokens} tokens of 64 when encoded again"
    )


def test_another_model_than_the_store_was_made_with_is_refused_by_field(store: Path, model: Path) -> None:
    other = model.parent / "other" / "model"
    result, _ = verified(store, "--reencode", "1", "--encoder-model", f"t5={other}")
    assert result.code == 2
    assert "weights_sha256" in result.err
    assert "--encoder-model t5=..." in result.err
    unknown, _ = verified(store, "--reencode", "1", "--encoder-model", f"clip={other}")
    assert (unknown.code, "no such encoder; it has ['t5']" in unknown.err) == (2, True)
    malformed, _ = verified(store, "--reencode", "1", "--encoder-model", "t5")
    assert (malformed.code, "give NAME=MODEL" in malformed.err) == (2, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fingerprint.model", "google/t5-v1_1-xxl"),
        ("fingerprint.revision", "0123abcd"),
        ("fingerprint.weights_sha256", "00" * 32),
        ("fingerprint.tokenizer_sha256", "11" * 32),
        ("fingerprint.max_tokens", 77),
        ("fingerprint.text_normalisation", "lower case"),
        ("fingerprint.compute_dtype", "float32"),
        ("fingerprint.output", "penultimate"),
        ("dtype", "int8"),
    ],
)
def test_each_field_of_a_fingerprint_is_shown_and_refused_with_both_values(
    copy_of_small_run: Path, key: str, value: object
) -> None:
    path = copy_of_small_run / "state" / "text-t5.json"
    state = json.loads(path.read_text())
    place = state["config"]
    *parents, name = key.split(".")
    for parent in parents:
        place = place[parent]
    now, place[name] = place[name], value
    path.write_text(json.dumps(state))
    run = RunFolder(copy_of_small_run)
    for record in run.records("text-t5"):  # the store as the other configuration would have made it
        run.write_record(replace(record, fingerprint=digest(state)))
    shown = call("inspect", str(copy_of_small_run)).out
    assert f"{name}: {now}" in shown if parents else f"dim 64, {now}" in shown
    with pytest.raises(StaleOutputError) as caught:
        precompute(copy_of_small_run, *SMALL)
    assert f"text-t5.{key}: {value} -> {'null' if now is None else now}\n" in str(caught.value)
