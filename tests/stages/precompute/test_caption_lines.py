"""Captions keep their tabs and line ends in the store; recipes read them, other encoders read spaces as ever."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from imagen_core.store import Store, verify_store
from stages import captions
from stages.encoders.encoder import load_encoder
from stages.encoders.prompts import encode_prompts
from stages.encoders.registry import AnyEncoder
from stages.store_tools.reencode import reencode
from tests.runs import precompute, store_bytes
from tests.stages.encoders import tiny_models
from tests.stages.encoders.recipes.pipelines import decoder

LINES = 'a sign:\n\t"OPEN"\r\nand a cat'
JSON = '{\n  "subject": "a red fox",\n  "note": "two\\nlines"\n}'
CAPTIONS = [LINES, 'a sign:  "OPEN"  and a cat', JSON, "one line"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(decoder("Qwen3"), tmp_path_factory.mktemp("models") / "qwen3")


def settings_of(model: Path, name: str, **settings: Any) -> dict[str, Any]:
    machine = {"model": str(model), "compute_dtype": "float32", "num_gpus": 0}
    return {"name": name, "kind": "auto", **machine, **settings}


def run(out: Path, texts: list[str], encoders: list[dict[str, Any]]) -> dict[str, Any]:
    table = out.parent / "captions.parquet"
    pq.write_table(pa.table({"caption": texts}), table)
    source = {"kind": "parquet", "path": str(table), "image_column": None}
    settings = {"source": source, "images": {"sizes_px": []}, "store": {"dtype": "float32"}, "encoders": encoders}
    return precompute(out, *(f"{key}={json.dumps(value)}" for key, value in settings.items()), "shard_size=2")


def as_earlier_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "clean_caption", lambda text: captions.on_one_line(text).strip())


@pytest.mark.slow
def test_a_recipe_reads_lines_and_another_encoder_reads_spaces(model: Path, tmp_path: Path) -> None:
    plain, chat = settings_of(model, "plain"), settings_of(model, "chat", template={"chat": {}})
    run(tmp_path / "run", CAPTIONS, [plain, chat])
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.captions for sample in store] == [[caption] for caption in CAPTIONS]
    rows = {name: [sample.text[name][0] for sample in store] for name in ("plain", "chat")}
    spaces = [captions.on_one_line(caption) for caption in CAPTIONS]
    assert spaces[0] == spaces[1] == CAPTIONS[1]
    np.testing.assert_allclose(rows["plain"][0], rows["plain"][1], atol=1e-5)
    for name, texts in (("plain", spaces), ("chat", CAPTIONS)):
        encoder = load_encoder(TypeAdapter(AnyEncoder).validate_python({"plain": plain, "chat": chat}[name]), 1)
        for found, text in zip(rows[name], texts, strict=True):
            np.testing.assert_allclose(found, encoder.encode([text]).embeddings[0], atol=1e-5)
    lost = load_encoder(TypeAdapter(AnyEncoder).validate_python(chat), 1).encode([spaces[0]]).embeddings[0]
    assert np.abs(rows["chat"][0] - lost).max() > 1e-2, "the lines decide the rows"
    record = store.encoder_record(store.manifest.texts["chat"])
    (prompt,) = encode_prompts([f" {LINES}\n"], record, model=str(model), use_gpu=False)
    np.testing.assert_allclose(prompt, rows["chat"][0], atol=1e-5)
    assert reencode(store, 1.0, seed=0, models={"plain": str(model), "chat": str(model)})["chat"].problems == []
    assert verify_store(tmp_path / "run" / "store").ok


@pytest.mark.slow
@pytest.mark.parametrize("texts", [CAPTIONS, ["a cat", "a dog", "a fox", "an owl"]], ids=["lines", "no lines"])
def test_what_an_earlier_version_finished_is_kept_and_is_not_made_again(
    texts: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, encoders = tmp_path / "run", [settings_of(model, "plain"), settings_of(model, "layers", layers=[-2])]
    as_earlier_versions(monkeypatch)
    run(out, texts, encoders)
    monkeypatch.undo()
    before = store_bytes(out)
    assert run(out, texts, encoders)["tally"]["shards_skipped"] == 2
    assert store_bytes(out) == before
    run(out, texts, [*encoders, settings_of(model, "chat", template={"chat": {}})])
    store = Store.open(out / "store")
    stored = [captions.on_one_line(text) for text in texts]
    assert [sample.captions for sample in store] == [[text] for text in stored], "a later encoder reads what is stored"
    later = load_encoder(TypeAdapter(AnyEncoder).validate_python(settings_of(model, "c", template={"chat": {}})), 1)
    np.testing.assert_allclose(store[0].text["chat"][0], later.encode(stored[:1]).embeddings[0], atol=1e-5)


@pytest.mark.slow
def test_without_control_characters_a_run_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, encoders = ["a cat", "a dog", "a fox", "an owl"], [settings_of(model, "plain")]
    for name in ("earlier", "both"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patched:
        as_earlier_versions(patched)
        run(tmp_path / "earlier" / "run", texts, encoders)
        shutil.copytree(tmp_path / "earlier" / "run", tmp_path / "both" / "run")
    for group in ("samples", "text-plain"):
        (tmp_path / "both" / "run" / "state" / group / "00001.json").unlink()
    run(tmp_path / "both" / "run", texts, encoders)
    assert store_bytes(tmp_path / "both" / "run") == store_bytes(tmp_path / "earlier" / "run")
