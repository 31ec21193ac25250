"""Every kind of encoder gives what transformers gives caption by caption, whatever the batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LongT5EncoderModel,
    SiglipTextModel,
    T5GemmaModel,
)

from imagen_core.store import Store
from pipeline.errors import ConfigError, MachineError
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.prompts import encoder_of
from stages.encoders.registry import AnyEncoder
from tests.runs import precompute
from tests.stages.encoders import tiny_models

CAPTIONS = [
    "a red circle above a blue square",
    "",
    "a",
    "one two three four five six seven eight nine ten",
    "A strange caption: 🐈 خط é",
    "a red circle above a blue square!",
    "x" * 40,
]
KINDS: dict[str, tuple[Callable[[Path], None], dict[str, Any], Any]] = {
    "T5": (tiny_models.t5, {"kind": "t5"}, AutoModelForTextEncoding),
    "mT5": (tiny_models.mt5, {"kind": "t5"}, AutoModelForTextEncoding),
    "umT5": (tiny_models.umt5, {"kind": "t5"}, AutoModelForTextEncoding),
    "ByT5": (tiny_models.byt5, {"kind": "t5"}, AutoModelForTextEncoding),
    "CLIP": (tiny_models.clip, {"kind": "clip"}, CLIPTextModel),
    "CLIP, penultimate": (tiny_models.clip, {"kind": "clip", "output": "penultimate"}, CLIPTextModel),
    "CLIP, pooled": (tiny_models.clip, {"kind": "clip", "output": "pooled"}, CLIPTextModel),
    "CLIP, projected": (tiny_models.clip, {"kind": "clip", "output": "projected"}, CLIPTextModelWithProjection),
    "CLIP's text half": (tiny_models.clip_text, {"kind": "clip"}, CLIPTextModel),
    "DeBERTa-v2": (tiny_models.deberta, {"kind": "auto"}, AutoModel),
    "BERT": (tiny_models.bert, {"kind": "auto"}, AutoModel),
    "XLM-RoBERTa": (tiny_models.xlm_roberta, {"kind": "auto"}, AutoModel),
    "Llama": (tiny_models.llama, {"kind": "auto"}, AutoModel),
    "T5Gemma": (tiny_models.t5gemma, {"kind": "auto"}, T5GemmaModel),
    "BART": (tiny_models.bart, {"kind": "auto"}, AutoModel),
    "LongT5": (tiny_models.long_t5, {"kind": "auto"}, LongT5EncoderModel),
    "SigLIP's text half": (tiny_models.siglip_text, {"kind": "auto"}, SiglipTextModel),
    "SigLIP": (tiny_models.siglip, {"kind": "auto"}, SiglipTextModel),
    "Llama, penultimate": (tiny_models.llama, {"kind": "auto", "output": "penultimate"}, AutoModel),
}


class Case:
    """A tiny model, its encoder, and the class of transformers that it is compared with."""

    def __init__(self, name: str, folder: Path):
        make, self.settings, self.reference_class = KINDS[name]
        self.folder = tiny_models.write(make, folder)
        self.encoder = self.load()

    def config(self, **changes: object) -> AnyEncoder:
        settings = {"name": "text", "model": str(self.folder), "compute_dtype": "float32", "num_gpus": 0, **changes}
        return TypeAdapter(AnyEncoder).validate_python({**settings, **self.settings})

    def load(self, **changes: object) -> TextEncoder:
        return load_encoder(self.config(**changes), 1)

    @torch.inference_mode()
    def reference(self, captions: list[str], max_tokens: int = 77) -> list[np.ndarray]:
        """transformers by itself, one caption at a time, so that nothing is ever padded."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = self.reference_class.from_pretrained(self.folder, dtype=torch.float32).eval()
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        return [
            self._output(
                model(
                    input_ids=tokenizer(c, truncation=True, max_length=max_tokens, return_tensors="pt").input_ids,
                    output_hidden_states=True,
                )
            )
            for c in captions
        ]

    def _output(self, result: Any) -> np.ndarray:
        output = self.settings.get("output", "last_hidden_state")
        if output == "penultimate":
            return result.hidden_states[-2][0].numpy()
        if output == "pooled":
            return result.pooler_output.numpy()
        return (result.text_embeds if output == "projected" else result.last_hidden_state[0]).numpy()


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("models") / "model")


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [e.shape for e in found] == [e.shape for e in expected]
    scale = max(np.abs(e).max() for e in expected)
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1e-5 * max(1, scale)


def test_the_result_is_what_transformers_gives_caption_by_caption(case: Case) -> None:
    found = case.encoder.encode(CAPTIONS)
    assert_close(found.embeddings, case.reference(CAPTIONS))
    assert found.num_truncated == 0
    assert {e.shape[1] for e in found.embeddings} == {case.config().identify().dim} == {case.encoder.dim}


@pytest.mark.slow
def test_a_cut_caption_is_what_the_tokenizer_cuts_it_to_and_is_counted(case: Case) -> None:
    lengths = [len(ids) for ids in case.encoder.tokenizer(CAPTIONS)["input_ids"]]
    found = case.load(max_tokens=6).encode(CAPTIONS)
    assert_close(found.embeddings, case.reference(CAPTIONS, max_tokens=6))
    assert found.num_truncated == sum(length > 6 for length in lengths)


@pytest.mark.parametrize("tokens_per_batch", [30, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4096))])
def test_the_result_does_not_depend_on_the_batches(case: Case, tokens_per_batch: int) -> None:
    alone = [case.encoder.encode([caption]).embeddings[0] for caption in CAPTIONS]
    other = case.load(tokens_per_batch=tokens_per_batch)
    order = np.random.default_rng(0).permutation(len(CAPTIONS))
    mixed = other.encode([CAPTIONS[i] for i in order] + ["other words"] * 20).embeddings
    assert_close([mixed[position] for position in np.argsort(order)], alone)


def test_the_configuration_can_be_had_back_from_the_fingerprint(case: Case) -> None:
    identity = case.config(max_tokens=9).identify()
    trained_on = {"name": "text", "dim": identity.dim, "dtype": "float16", "fingerprint": identity.fingerprint}
    again = encoder_of(trained_on, str(case.folder), use_gpu=False)
    assert again.identify() == identity
    assert type(again) is type(case.config())


@pytest.mark.slow
def test_bfloat16_differs_by_its_rounding_only(case: Case) -> None:
    found = case.load(compute_dtype="bfloat16").encode(CAPTIONS).embeddings
    for a, b in zip(found, case.encoder.encode(CAPTIONS).embeddings, strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1


def test_the_workload_counts_the_rows_that_are_stored_and_the_products(case: Case) -> None:
    found = case.config().workload(CAPTIONS)
    assert found.tokens == [len(e) for e in case.encoder.encode(CAPTIONS).embeddings]
    tokens = sum(len(ids) for ids in case.encoder.tokenizer(CAPTIONS)["input_ids"])
    least = 2 * tokens * 2 * (3 * 24 * 24 + 2 * 24 * 40)  # two layers of the smallest model here
    assert least < found.flops < 20 * least


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("CLIP", {"kind": "t5"}, r"is no T5 \(model_type 'clip' in config\.json\); give a T5.*or kind: auto"),
        ("T5", {"kind": "clip"}, r"is no CLIP \(model_type 't5'.*in the format of transformers, or kind: auto"),
        ("CLIP", {"kind": "auto"}, r"is no text encoder \(model_type 'clip'.*for CLIP, kind: clip"),
        (
            "CLIP",
            {"kind": "clip", "max_tokens": 78},
            r"encoder text: max_tokens is 78, but .* takes at most 77 tokens",
        ),
        ("BERT", {"kind": "auto", "max_tokens": 513}, r"encoder text: max_tokens is 513, .* at most 512 tokens"),
    ],
)
def test_a_model_that_does_not_fit_its_kind_is_refused(
    name: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = tiny_models.write(KINDS[name][0], tmp_path)
    config = TypeAdapter(AnyEncoder).validate_python({"name": "text", "model": str(folder), **settings})
    with pytest.raises(ConfigError, match=says):
        config.identify()


def test_the_empty_caption_of_a_language_model_without_a_start_token_is_its_end_token(tmp_path: Path) -> None:
    folder = tiny_models.write(tiny_models.qwen2, tmp_path / "lm")
    settings = {"name": "lm", "kind": "auto", "model": str(folder), "compute_dtype": "float32", "num_gpus": 0}
    config = TypeAdapter(AnyEncoder).validate_python(settings)
    encoder = load_encoder(config, 1)
    assert encoder.tokenizer("")["input_ids"] == []
    empty, end, words = encoder.encode(["", "</s>", "a red circle"]).embeddings
    assert empty.shape == (1, 24)
    assert_close([empty], [end])
    tokens = len(encoder.tokenizer("a red circle")["input_ids"])
    assert words.shape == (tokens, 24)
    assert config.identify().fingerprint["tokenizer"]["empty_token"] == "</s>"
    assert config.workload(["", "a red circle"]).tokens == [1, tokens]


def test_a_tokenizer_with_nothing_for_the_empty_caption_is_refused_at_once(tmp_path: Path) -> None:
    folder = tiny_models.write(tiny_models.bare_llama, tmp_path / "lm")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    config = TypeAdapter(AnyEncoder).validate_python({"name": "lm", "kind": "auto", "model": str(folder)})
    with pytest.raises(MachineError, match=r"no token for the empty caption, and has no bos_token, eos_tok"):
        config.identify()


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    tiny_models.write(tiny_models.bert, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch", "hidden_size": 8}', encoding="utf-8")
    config = TypeAdapter(AnyEncoder).validate_python({"name": "text", "kind": "auto", "model": str(tmp_path)})
    with pytest.raises(MachineError, match="transformers knows no model_type 'nonesuch'"):
        config.identify()


# ---- several in one run ----


@pytest.mark.slow
def test_several_encoders_are_groups_of_their_own_and_one_added_later_touches_nothing_else(tmp_path: Path) -> None:
    clip = tiny_models.write(tiny_models.clip, tmp_path / "clip")
    bert = tiny_models.write(tiny_models.bert, tmp_path / "bert")
    t5 = "{name: t5, kind: t5, model: tiny-random-t5}"
    tokens = f"{{name: clip, kind: clip, model: {clip}}}"
    pooled = f"{{name: clip-embed, kind: clip, model: {clip}, output: projected}}"
    extra = f"{{name: bert, kind: auto, model: {bert}}}"
    settings = ("source.num_samples=12", "images.sizes_px=[8]", "shard_size=5")
    out = tmp_path / "run"
    precompute(out, *settings, f"encoders=[{t5}, {tokens}, {pooled}]")
    before = {path: path.read_bytes() for path in (out / "store").rglob("*.parquet")}
    store = Store.open(out / "store")
    assert store.encoders == ["clip", "clip-embed", "t5"]
    sample = store[3]
    assert [sample.text[name][0].shape[1] for name in store.encoders] == [24, 16, 64]
    assert sample.text["clip-embed"][0].shape == (1, 16)
    batch = next(iter(store.loader(batch_size=4, images=[8], text="clip-embed")))
    assert batch["text"].shape == (4, 1, 16)
    precompute(out, *settings, f"encoders=[{t5}, {tokens}, {pooled}, {extra}]")
    assert Store.open(out / "store").encoders == ["bert", "clip", "clip-embed", "t5"]
    assert {path: path.read_bytes() for path in before} == before
