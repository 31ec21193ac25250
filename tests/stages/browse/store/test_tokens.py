"""Tokens are shown by the tokenizer that made the embeddings, or not at all."""

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from imagen_core.store import Store, TextGroup
from pipeline.storage.run_folder import RunFolder
from stages.browse.store.tokens import Tokens, tokens_of
from stages.encoders.batches.tokens import empty_token
from stages.encoders.identity import tokenizer_settings
from stages.encoders.model_files import tokenizer_digest
from stages.encoders.recipes.shipped import recipes
from stages.encoders.registry import AnyEncoder
from stages.encoders.tiny import write_tiny_model
from tests.stages.encoders.recipes.pipelines import CAPTIONS, write_tokenizer

RED = "a red circle above a blue square"


def group(**fingerprint: Any) -> TextGroup:
    found = {"model": "tiny-random-t5", "kind": "t5", "revision": None, **fingerprint}
    return TextGroup("text-t5", "t5", 4, "float16", "parquet", found)


def texts(tokens: Tokens, state: str) -> list[str]:
    return [token.text for token in tokens.shown if token.state == state for _ in range(token.times)]


class Encoder:
    """An encoder with a tokenizer that has a token for each byte: its fingerprint, and a run that names its folder."""

    def __init__(self, folder: Path, **settings: Any):
        write_tokenizer(folder / "model", "<s> $A")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        kind = {} if "recipe" in settings else {"kind": "auto"}
        given = {"name": "t5", **kind, "model": str(folder / "model"), **settings}
        self.config: Any = TypeAdapter(AnyEncoder).validate_python(given)
        (folder / "run").mkdir()
        (folder / "run" / "config.yaml").write_text(f"encoders: [{{name: t5, model: {folder / 'model'}}}]\n")
        self.run = RunFolder(folder / "run")
        self.group = group(
            kind=self.config.kind,
            model="model",
            **self.config.recorded_fields(),
            tokenizer_sha256=tokenizer_digest(folder / "model"),
            tokenizer=tokenizer_settings(self.tokenizer, empty_token(self.tokenizer)),
            **self.config.reading_settings(self.tokenizer),
        )

    def tokens(self, caption: str, stored: int) -> Tokens:
        return tokens_of(caption, stored, self.group, self.run)


def test_the_stored_number_of_tokens_is_that_of_the_tokenizer(small_run: Path) -> None:
    store = Store.open(small_run / "store")
    made = store.manifest.texts["t5"]
    for sample in store:
        tokens = tokens_of(sample.captions[0], len(sample.text["t5"][0]), made, None)
        assert tokens.note is None
        assert len(texts(tokens, "stored")) == tokens.stored == len(sample.text["t5"][0])
        assert tokens.shown[-1].text == "</s>"
        assert "".join(texts(tokens, "stored")[:-1]).replace("▁", " ").strip() == sample.captions[0]


def test_where_a_caption_is_cut_its_end_of_sequence_stays() -> None:
    tokens = tokens_of(RED, 4, group(max_tokens=4), None)
    assert texts(tokens, "stored") == ["▁a", "▁red", "▁circle", "</s>"]
    assert texts(tokens, "cut") == ["▁above", "▁a", "▁blue", "▁square"]
    assert tokens.cut == 4


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    longer = {"max_tokens": 1024} if name == "hunyuan-video" else {}  # its template has more bytes than tokens
    encoder = Encoder(tmp_path, recipe=name, **longer)
    read = encoder.config.reader(encoder.tokenizer)
    for caption in (*CAPTIONS, ""):
        ((expected,), _) = read([caption])
        stored = 1 if encoder.config.output in ("pooled", "projected") else expected.num_rows
        found = encoder.tokens(caption, stored)
        assert found.note is None
        shown = [t.id for t in found.shown if t.state != "cut" for _ in range(t.times)]
        assert shown == expected.ids
        assert found.zeros == expected.zeros_before + expected.zeros_after
        if not found.pooled:
            assert len(texts(found, "stored")) + found.zeros == stored


def test_a_template_is_shown_and_what_is_dropped_or_cut_of_it(tmp_path: Path) -> None:
    settings = {"template": {"prefix": "See: ", "suffix": "."}, "drop_prefix": "prefix", "max_tokens": 4}
    tokens = Encoder(tmp_path, **settings).tokens("abcdef", 4)
    assert "".join(texts(tokens, "dropped")) == "<s>See:Ġ"
    assert texts(tokens, "stored") == ["a", "b", "c", "d"]
    assert texts(tokens, "cut") == ["e", "f", "."]
    assert tokens.cut == 3


def test_a_chat_template_is_the_recorded_one(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, template={"chat": {"enable_thinking": False}})
    ((expected,), _) = encoder.config.reader(encoder.tokenizer)(["a cat"])
    tokens = encoder.tokens("a cat", expected.num_rows)
    assert "".join(texts(tokens, "stored")).startswith("<s><|im_start|>userĊaĠcat<|im_end|>")


def test_padding_is_one_token_many_times(tmp_path: Path) -> None:
    tokens = Encoder(tmp_path, pads={"to": 64}, max_tokens=64).tokens("abc", 64)
    assert [(token.text, token.times) for token in tokens.shown] == [
        ("<s>", 1),
        ("a", 1),
        ("b", 1),
        ("c", 1),
        ("<pad>", 60),
    ]


def test_one_vector_of_a_caption_stands_for_its_tokens(tmp_path: Path) -> None:
    tokens = Encoder(tmp_path, kind="clip", output="pooled").tokens("ab", 1)
    assert (tokens.pooled, tokens.note, texts(tokens, "stored")) == (True, None, ["<s>", "a", "b"])


def test_a_caption_of_100_000_characters_is_cut_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    tokens = tokens_of("red circle " * 9_000 + "red", 128, group(max_tokens=128), None)
    assert (tokens.note, tokens.stored, tokens.cut) == (None, 128, 18_001 - 127)
    assert len(texts(tokens, "cut")) == 200


def test_a_number_that_the_tokenizer_does_not_give_is_a_count_only() -> None:
    tokens = tokens_of("a red circle", 9, group(max_tokens=128), None)
    assert (tokens.stored, tokens.shown) == (9, [])
    assert tokens.note == "the tokenizer gives 4 rows of the caption, not 9"


@pytest.mark.parametrize(
    ("fingerprint", "note"),
    [
        ({"model": "nobody/nothing"}, "the tokenizer of nobody/nothing is not on this machine"),
        ({"kind": "given"}, "the embeddings came with the data"),
        ({"kind": "of another package"}, "encoder t5: "),
        ({"max_tokens": "many"}, "encoder t5: its fingerprint cannot be read"),
        (
            {"template": {"system": "Hi", "chat": {}}, "drop_prefix": "system", "chat_text": ["", ""]},
            "only the model's chat template says",
        ),
    ],
)
def test_what_cannot_be_shown_says_why(fingerprint: dict[str, Any], note: str) -> None:
    tokens = tokens_of(RED, 8, group(**fingerprint), None)
    assert tokens.shown == []
    assert note in (tokens.note or "")


def test_another_tokenizer_in_the_folder_is_not_used(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"encoders: [{{name: t5, model: {tmp_path / 'mine'}}}]\n")
    run, digest = RunFolder(tmp_path / "run"), tokenizer_digest(tmp_path / "mine")
    same, other = group(model="mine", tokenizer_sha256=digest), group(model="mine", tokenizer_sha256="0" * 64)
    assert [token.text for token in tokens_of("a red", 3, same, run).shown] == ["▁a", "▁red", "</s>"]
    refused = tokens_of("a red", 3, other, run)
    assert refused.shown == []
    assert refused.note == "the tokenizer on this machine is another one than that of the fingerprint"


def test_a_tokenizer_of_another_file_is_said_to_be_one(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path)
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "model" / "spiece.model")
    note = encoder.tokens(RED, 8).note
    assert note == "the tokenizer of model has no tokenizer.json on this machine; others cannot be read here"
