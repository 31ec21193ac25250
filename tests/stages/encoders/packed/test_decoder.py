"""Captions laid end to end, behind tokens that are run once, give what transformers gives one by one."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor

from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.packed.decoder import FAMILIES, PackedDecoder, is_packable
from stages.encoders.padded import PaddedModel
from stages.encoders.recipes.states import LayerStates
from stages.encoders.registry import AnyEncoder
from tests.stages.encoders import tiny_models
from tests.stages.encoders.recipes.pipelines import DECODER, MROPE, decoder

SHAPE: dict[str, Any] = {
    **DECODER,
    "num_hidden_layers": 3,
    "vocab_size": 60,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_MROPE = {"rope_parameters": MROPE, "rope_scaling": MROPE}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "ministral3": ("Ministral3", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {}),
    "granite": ("Granite", {"attention_multiplier": 0.3}),
    "olmo2": ("Olmo2", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, **_SLIDING}),
    "qwen3": ("Qwen3", {}),
    "qwen2_5_vl_text": ("Qwen2_5_VLText", {"num_attention_heads": 2, "num_key_value_heads": 1, **_MROPE}),
    "qwen3_vl_text": ("Qwen3VLText", _MROPE),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, **_SLIDING}),
    "gemma3_text": ("Gemma3Text", {"query_pre_attn_scalar": 16, **_SLIDING}),
}
LENGTHS = [33, 12, 12, 7, 2, 2, 1]
SHARED = 20


def build(family: str) -> Any:
    """A model whose tokens attend to others distinctly."""
    name, more = CASES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**{**SHAPE, **more}))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1)
    assert model.config.model_type == family
    return model.eval().requires_grad_(False)


def alone(model: Any, captions: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids[None]).last_hidden_state[0] for ids in captions]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to 1e-5 of the largest value, or 1e-5."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_every_family_is_compared() -> None:
    assert CASES.keys() == FAMILIES


@pytest.mark.parametrize("family", CASES)
@torch.inference_mode()
def test_every_caption_is_what_transformers_gives_alone(family: str) -> None:
    model = build(family)
    assert is_packable(model.config)
    ids = torch.randint(3, 60, (sum(LENGTHS),))
    expected = alone(model, ids.split(LENGTHS))
    packed = PackedDecoder(copy.deepcopy(model), "last_hidden_state")
    assert_close(packed(ids, LENGTHS).split(LENGTHS), expected)
    assert_close(packed(ids.flip(0), LENGTHS[::-1]).split(LENGTHS[::-1])[:1], alone(model, [ids.flip(0)[:1]]))


@pytest.mark.parametrize("family", CASES)
@torch.inference_mode()
def test_captions_behind_shared_tokens_are_what_they_are_with_them(family: str) -> None:
    model = build(family)
    prefix, ids = torch.randint(3, 60, (SHARED,)), torch.randint(3, 60, (sum(LENGTHS),))
    shares = [True, True, False, True, False, True, True]
    whole = [torch.cat([prefix, part]) if s else part for part, s in zip(ids.split(LENGTHS), shares, strict=True)]
    expected = alone(model, whole)
    packed = PackedDecoder(copy.deepcopy(model), "last_hidden_state")
    assert_close([packed.share(prefix)], [expected[0][:SHARED]])
    found = packed(ids, LENGTHS, shares=shares).split(LENGTHS)
    assert_close(found, [rows[-n:] for rows, n in zip(expected, LENGTHS, strict=True)])
    assert_close(packed(ids, LENGTHS).split(LENGTHS), alone(model, ids.split(LENGTHS)))


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@torch.inference_mode()
def test_masked_places_and_layers_are_what_they_are_with_padding(family: str) -> None:
    model = build(family)
    ids = torch.randint(3, 60, (sum(LENGTHS),))
    masked = [(25, 28), (9, 12), (0, 0), (2, 5), (0, 0), (1, 2), (0, 0)]
    for layers in (None, (1, 3)):
        models = [copy.deepcopy(model) for _ in range(2)]
        states = [None if layers is None else LayerStates(each, layers, True, "concat") for each in models]
        padded = PaddedModel(models[0], "last_hidden_state", states[0])
        packed = PackedDecoder(models[1], "last_hidden_state", states[1])
        assert_close([packed(ids, LENGTHS, masked)], [padded(ids, LENGTHS, masked)])
        packed.share(ids[:1])
        found = packed(ids[1:33], [32], masked[:1], [True])
        assert_close([found], [padded(ids[:33], [33], masked[:1])[1:]])


@torch.inference_mode()
def test_the_state_before_the_last_layer_is_that_of_transformers() -> None:
    model, ids = build("llama"), torch.randint(3, 60, (9,))
    found = PackedDecoder(copy.deepcopy(model), "penultimate")(ids, [9])
    expected = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-2][0]
    assert_close([found], [expected])


def test_a_model_that_attends_to_both_sides_is_not_packed() -> None:
    assert is_packable(transformers.Gemma3TextConfig(**SHAPE))
    assert not is_packable(transformers.Gemma3TextConfig(**SHAPE, use_bidirectional_attention=True))
    assert not is_packable(transformers.BertConfig())


# ---- through an encoder ----

CAPTIONS = ["a red circle above a blue square", "one", "", "two words", "Zebras, 3 of them", "é", "word " * 40]
PREFIX = "Describe the image, please: "
RECIPES: dict[str, dict[str, Any]] = {
    "all rows": {},
    "prefix dropped": {"drop_prefix": "prefix", "empty": {"text": "none"}},
    "two rows kept": {"drop_prefix": "prefix", "keep_prefix": [1, 1], "empty": "plain"},
    "fewer rows dropped": {"drop_prefix": 9, "layers": [1, -1]},
    "more rows dropped": {"drop_prefix": 29, "template": {"prefix": PREFIX, "suffix": " END"}},
    "padding masked": {"max_tokens": 64, "pads": {"to": 64}, "drop_prefix": 28},
    "padding left": {"pads": {"multiple_of": 16, "mode": "encoded"}, "padding_side": "left"},
    "zeros left": {"max_tokens": 64, "pads": {"to": 64, "mode": "zeroed"}, "padding_side": "left", "drop_prefix": 5},
    "text behind": {
        "max_tokens": 64,
        "pads": {"to": 64},
        "template": {"prefix": PREFIX, "suffix_after_pads": "END"},
        "empty": "plain",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"query_pre_attn_scalar": 16, "sliding_window": 100}
    return tiny_models.write(decoder("Gemma2", "<s> $A", **more), tmp_path_factory.mktemp("models") / "gemma2")


def load(folder: Path, **settings: Any) -> TextEncoder:
    machine = {"model": str(folder), "compute_dtype": "float32", "num_gpus": 0}
    recipe = {"template": {"prefix": PREFIX}, **settings}
    config = TypeAdapter(AnyEncoder).validate_python({"name": "text", "kind": "auto", **machine, **recipe})
    return load_encoder(config, 1)


def padded(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> TextEncoder:
    with monkeypatch.context() as patch:
        patch.setattr("stages.encoders.packed.decoder.is_packable", lambda config: False)
        encoder = load(folder, **settings)
    assert isinstance(encoder.model, PaddedModel)
    return encoder


def assert_same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    assert [rows.shape for rows in found] == [rows.shape for rows in expected]
    assert max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_an_encoder_gives_what_it_gives_with_padding(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, reference = load(folder, **RECIPES[name]), padded(folder, monkeypatch, **RECIPES[name])
    expected = reference.encode(CAPTIONS).embeddings
    assert_same(encoder.encode(CAPTIONS).embeddings, expected)
    assert_same([encoder.encode([caption]).embeddings[0] for caption in CAPTIONS], expected)
    encoder.tokens_per_batch = 50
    assert_same(encoder.encode(CAPTIONS[::-1]).embeddings, expected[::-1])
    assert_same([reference.encode([caption]).embeddings[0] for caption in CAPTIONS], expected)


def test_tokens_that_all_captions_begin_with_are_run_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int] = []
    encoder = load(folder, empty="plain")
    call = encoder.model._run  # type: ignore[attr-defined]
    monkeypatch.setattr(encoder.model, "_run", lambda ids, *rest: run.append(len(ids)) or call(ids, *rest))
    encoder.encode(["one", "two words", ""])
    assert run == [len("onetwo words") + 1], "the empty caption has its start token, and no template"


def test_a_short_start_is_not_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(folder, template={"prefix": "See: "})._shared_states is None
    monkeypatch.setattr("stages.encoders.batches.model_input._LEAST_SHARED", 1)
    encoder = load(folder, template={"prefix": "See: "})
    assert encoder._shared_states is not None
    assert encoder._shared_states.shape == (6, 32)


def test_the_workload_counts_shared_tokens_of_no_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(folder).config
    prefix, whole = 1 + len(PREFIX), 1 + len(PREFIX) + len("two words")
    with config.located() as files:
        counted = [config.flops(files, [length]) for length in (prefix, whole)]
    assert config.workload(["two words"] * 2).flops == pytest.approx(2 * (counted[1] - counted[0]))
    monkeypatch.setattr("stages.encoders.packed.decoder.is_packable", lambda config: False)
    assert config.workload(["two words"]).flops == pytest.approx(counted[1])
