"""What decides an encoder's embeddings is in its fingerprint by name, or its probe shows it; nothing else is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

from imagen_core.store import probe_differences
from pipeline.errors import ConfigError, MachineError
from stages.encoders.batches import tokens
from stages.encoders.encoder import TextEncoder, load_encoder
from stages.encoders.identity import acting_settings, identity_changes, identity_to_keep
from stages.encoders.packed import t5 as t5_packed
from stages.encoders.probe import null_problem, probe_problem, take_probe
from stages.encoders.prompts import encode_prompts
from stages.encoders.registry import AnyEncoder
from tests.stages.encoders import tiny_models

LATER = ("model_config", "tokenizer")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    makers = {"t5": tiny_models.t5, "auto": tiny_models.llama}
    return {kind: tiny_models.write(make, parent / kind) for kind, make in makers.items()}


def config(folder: Path, kind: str = "t5", **changes: object) -> AnyEncoder:
    settings = {"name": "text", "kind": kind, "model": str(folder), "compute_dtype": "float32", "num_gpus": 0}
    return TypeAdapter(AnyEncoder).validate_python({**settings, **changes})


def fingerprint(folder: Path, kind: str = "t5") -> dict[str, Any]:
    return config(folder, kind).identify().fingerprint


# ---- files: each change is named ----


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Sets keys of a JSON file; a dotted key is a path."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = content
            for parent in parents:
                place = place[parent]
            place[last] = value
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return apply


def add_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    entry = {"id": 3, "content": "<0x00>", "special": False}
    content["added_tokens"].append({**content["added_tokens"][-1], **entry})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


NO_END = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
MUTATIONS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "epsilon": ("t5", edit(CONFIG, layer_norm_epsilon=1e-3), "model_config.layer_norm_epsilon: (absent) -> 0.001"),
    "activation": ("t5", edit(CONFIG, feed_forward_proj="gated-silu"), "model_config.feed_forward_proj: gated-gelu"),
    "tie": ("t5", edit(CONFIG, tie_word_embeddings=False), "model_config.tie_word_embeddings"),
    "number of heads": ("t5", edit(CONFIG, num_heads=2), "model_config.num_heads: 4 -> 2"),
    "number of layers": ("t5", edit(CONFIG, num_layers=1), "model_config.num_layers: 2 -> 1"),
    "distance": ("t5", edit(CONFIG, relative_attention_max_distance=64), "model_config.relative_attention_max_dist"),
    "rope theta": ("auto", edit(CONFIG, rope_parameters__rope_theta=5.0), "model_config.rope_parameters.rope_theta"),
    "norm of a language model": ("auto", edit(CONFIG, rms_norm_eps=1e-3), "model_config.rms_norm_eps"),
    "attention": ("auto", edit(CONFIG, attn_implementation="eager"), "model_config.attn_implementation"),
    "post-processor": ("t5", edit(TOKENIZER, post_processor=NO_END), "tokenizer.post_processor."),
    "normalizer": ("t5", edit(TOKENIZER, normalizer={"type": "Lowercase"}), "tokenizer.normalizer: (absent) -> "),
    "words": ("t5", edit(TOKENIZER, pre_tokenizer__prepend_scheme="first"), "tokenizer.pre_tokenizer.prepend_scheme"),
    "byte fallback": ("t5", edit(TOKENIZER, model__byte_fallback=False), "tokenizer.model.byte_fallback"),
    "added token": ("t5", add_token, "tokenizer.added_tokens.number: 3 -> 4"),
    "special token": ("t5", edit(TOKENIZER_CONFIG, eos_token="<unk>"), "tokenizer.special_tokens.eos_token: </s> -> "),
    "truncation side": ("t5", edit(TOKENIZER_CONFIG, truncation_side="left"), "truncation_side: right -> left"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_setting_is_named(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    kind, mutate, says = MUTATIONS[name]
    folder = shutil.copytree(models[kind], tmp_path / kind)
    before = fingerprint(folder, kind)
    mutate(folder)
    changes = identity_changes(before, fingerprint(folder, kind))
    assert any(says in change for change in changes), changes


def test_a_library_that_reads_the_same_files_otherwise_is_named(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(models["t5"])
    honest = tokens.load_tokenizer

    def in_lower_case(files: Any) -> Any:
        tokenizer = honest(files)
        tokenizer.backend_tokenizer.normalizer = Lowercase()
        tokenizer.__class__ = type("OtherTokenizer", (type(tokenizer),), {})
        return tokenizer

    monkeypatch.setattr(tokens, "load_tokenizer", in_lower_case)
    assert identity_changes(before, fingerprint(models["t5"])) == [
        "tokenizer.class: TokenizersBackend -> OtherTokenizer",
        'tokenizer.normalizer: (absent) -> {"type":"Lowercase"}',
    ]


def test_what_cannot_act_is_no_change(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["t5"], tmp_path / "elsewhere" / "t5")
    inert = {"transformers_version": "9", "architectures": ["X"], "dtype": "float16", "torch_dtype": "float16"}
    edit("config.json", **inert, _name_or_path="/a/b", dropout_rate=0.5, use_cache=True)(folder)
    assert fingerprint(folder) == fingerprint(models["t5"])


def test_an_adapter_beside_the_weights_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["t5"], tmp_path / "t5")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(MachineError, match=r"has adapter_config\.json: .*merge the adapter"):
        config(folder).identify()


def test_settings_of_nested_parts_count_and_their_inert_ones_do_not() -> None:
    found = acting_settings(
        {"text_config": {"hidden_size": 8, "dtype": "float32", "attention_dropout": 0.1}, "x": [1]}
    )
    assert found == {"text_config": {"hidden_size": 8}, "x": [1]}


def test_the_fingerprint_is_json_that_stays_small(models: dict[str, Path]) -> None:
    for kind, folder in models.items():
        assert len(json.dumps(fingerprint(folder, kind))) < 5_000


# ---- the probe: what no file shows ----


@pytest.fixture(scope="module")
def encoder(models: dict[str, Path]) -> TextEncoder:
    return load_encoder(config(models["t5"]), 1)


def other_attention(monkeypatch: pytest.MonkeyPatch, encoder: TextEncoder) -> None:
    honest = torch.nn.functional.scaled_dot_product_attention
    other = lambda *args, **options: honest(*args, **{**options, "scale": 0.9})  # noqa: E731
    monkeypatch.setattr(t5_packed.F, "scaled_dot_product_attention", other)


def patched_forward(monkeypatch: pytest.MonkeyPatch, encoder: TextEncoder) -> None:
    honest = t5_packed.PackedT5.__call__
    monkeypatch.setattr(t5_packed.PackedT5, "__call__", lambda self, ids, lengths: honest(self, ids, lengths) * 1.01)


def zeroed_embedding(monkeypatch: pytest.MonkeyPatch, encoder: TextEncoder) -> None:
    monkeypatch.setattr(encoder.model, "_embed", lambda ids: torch.zeros(len(ids), 64))


def other_activation(monkeypatch: pytest.MonkeyPatch, encoder: TextEncoder) -> None:
    monkeypatch.setattr(encoder.model, "_activation", torch.nn.functional.silu)


def other_tokens(monkeypatch: pytest.MonkeyPatch, encoder: TextEncoder) -> None:
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])


@pytest.mark.parametrize("patch", [other_attention, patched_forward, zeroed_embedding, other_activation, other_tokens])
def test_other_numbers_of_the_same_files_are_seen(
    patch: Callable[[pytest.MonkeyPatch, TextEncoder], None], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(config(models["t5"]), 1)
    before = take_probe(encoder)
    patch(monkeypatch, encoder)
    problem = probe_problem(before, take_probe(encoder), "float32")
    assert problem is not None
    assert "probe: 'A red square above a blue circle.': " in problem
    assert "with the same versions of libraries" in problem
    assert (" tokens -> " if patch is other_tokens else "0.10% are allowed") in problem


def test_another_library_is_named_beside_the_numbers(encoder: TextEncoder) -> None:
    before = take_probe(encoder)
    old = {**before, "environment": {**before["environment"], "transformers": "4.1"}}
    assert probe_problem(old, before, "float32") is None, "a version alone is no problem"
    for entry in old["inputs"]:
        entry["sketch"] = [number * 1.5 for number in entry["sketch"]]
    assert f"transformers: 4.1 -> {before['environment']['transformers']}" in str(
        probe_problem(old, take_probe(encoder), "float32")
    )


@pytest.mark.parametrize("changes", [{"tokens_per_batch": 1}, {"tokens_per_batch": 40}, {"cpu_threads": 2}])
def test_batches_and_threads_are_no_change(
    changes: dict[str, int], encoder: TextEncoder, models: dict[str, Path]
) -> None:
    assert config(models["t5"], **changes).identify() == config(models["t5"]).identify()
    other = load_encoder(config(models["t5"], **changes), changes.get("cpu_threads", 1))
    assert probe_differences(take_probe(encoder), take_probe(other), "float32") == []
    torch.set_num_threads(1)


def test_bfloat16_is_compared_by_its_own_rounding(encoder: TextEncoder, models: dict[str, Path]) -> None:
    coarse = take_probe(load_encoder(config(models["t5"], compute_dtype="bfloat16"), 1))
    assert probe_differences(take_probe(encoder), coarse, "bfloat16") == []
    assert probe_differences(take_probe(encoder), coarse, "float32")


def test_the_probe_has_a_truncated_caption_and_is_small(encoder: TextEncoder) -> None:
    probe = take_probe(encoder)
    assert len(probe["inputs"][0]["ids"]) == 1
    assert len(probe["inputs"][-1]["ids"]) == 128
    assert len(probe["inputs"][-1]["lengths"]) == 16
    assert len(json.dumps(probe)) < 20_000


def test_the_empty_caption_is_a_probe_for_a_run_that_has_no_other() -> None:
    stored = np.ones((1, 8), np.float16)
    assert null_problem(stored, np.full((1, 8), 1.0005, np.float32), "float32", "float16") is None
    assert "differs by 1.96%" in str(null_problem(stored, np.full((1, 8), 1.02, np.float32), "float32", "float16"))
    assert "(2, 8) now, (1, 8) when" in str(null_problem(stored, np.ones((2, 8), np.float32), "float32", "float16"))


def test_prompts_are_not_encoded_by_an_encoder_with_other_numbers(
    encoder: TextEncoder, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on = {"name": "text", "dim": 64, "dtype": "float32", "fingerprint": fingerprint(models["t5"])}
    with_probe = {**trained_on, "probe": take_probe(encoder)}
    model = str(models["t5"])
    (expected,) = encode_prompts(["a red fox"], with_probe, model=model, use_gpu=False)
    patched_forward(monkeypatch, encoder)
    with pytest.raises(ConfigError, match=r"gives other numbers than when the embeddings were made: probe: ''"):
        encode_prompts(["a red fox"], with_probe, model=model, use_gpu=False)
    (unseen,) = encode_prompts(["a red fox"], trained_on, model=model, use_gpu=False)
    assert np.allclose(unseen, expected * 1.01), "nothing was recorded, so nothing is compared"


# ---- what earlier versions recorded ----


def test_only_what_both_recorded_is_compared(models: dict[str, Path]) -> None:
    found = fingerprint(models["t5"])
    old = {name: value for name, value in found.items() if name not in LATER}
    assert identity_changes(old, found) == identity_changes(found, old) == []
    assert identity_changes({**old, "max_tokens": 7}, found) == ["max_tokens: 7 -> 128"]
    assert identity_to_keep(found, {"config": {"fingerprint": old}}) == old
    assert identity_to_keep(found, {"config": {"fingerprint": {**old, "max_tokens": 7}}}) == found
    assert identity_to_keep(found, None) == found
