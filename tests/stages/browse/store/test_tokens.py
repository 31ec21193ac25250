"""Tokens are shown by the tokenizer that made the embeddings, or not at all."""

from pathlib import Path
from typing import Any

from imagen_core.store import Store, TextGroup
from stages.browse.store.tokens import tokens_of
from stages.encoders.model_files import tokenizer_digest
from stages.encoders.tiny import write_tiny_model


def group(**fingerprint: Any) -> TextGroup:
    return TextGroup("text-t5", "t5", 4, "float16", "parquet", {"model": "tiny-random-t5", **fingerprint})


def test_the_stored_number_of_tokens_is_that_of_the_tokenizer(small_run: Path) -> None:
    store = Store.open(small_run / "store")
    made = store.manifest.texts["t5"]
    for sample in store:
        tokens = tokens_of(sample.captions[0], len(sample.text["t5"][0]), made, None)
        assert tokens.note is None
        assert len(tokens.shown) == tokens.stored == len(sample.text["t5"][0])
        assert tokens.shown[-1].text == "</s>"
        assert "".join(token.text for token in tokens.shown[:-1]).replace("▁", " ").strip() == sample.captions[0]


def test_where_a_caption_is_cut_its_end_of_sequence_stays() -> None:
    tokens = tokens_of("a red circle above a blue square", 4, group(max_tokens=4), None)
    assert [token.text for token in tokens.shown if not token.is_cut] == ["▁a", "▁red", "▁circle", "</s>"]
    assert [token.text for token in tokens.shown if token.is_cut] == ["▁above", "▁a", "▁blue", "▁square"]
    assert tokens.cut == 4


def test_a_number_that_the_tokenizer_does_not_give_is_a_count_only() -> None:
    tokens = tokens_of("a red circle", 9, group(max_tokens=128), None)
    assert (tokens.stored, tokens.shown) == (9, [])
    assert tokens.note is not None
    assert "4 tokens of the caption alone" in tokens.note


def test_another_tokenizer_in_the_folder_is_not_used(tmp_path: Path) -> None:
    from pipeline.storage.run_folder import RunFolder

    write_tiny_model(tmp_path / "mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"encoders: [{{name: t5, model: {tmp_path / 'mine'}}}]\n")
    run, digest = RunFolder(tmp_path / "run"), tokenizer_digest(tmp_path / "mine")
    same, other = group(model="mine", tokenizer_sha256=digest), group(model="mine", tokenizer_sha256="0" * 64)
    assert [token.text for token in tokens_of("a red", 3, same, run).shown] == ["▁a", "▁red", "</s>"]
    refused = tokens_of("a red", 3, other, run)
    assert refused.shown == []
    assert refused.note == "the tokenizer on this machine is another one than that of the fingerprint"
