"""A resumed run is refused with exit code 2 and what differs, where its encoder is no longer the one it began with;
and it is never refused for batches or threads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages.encoders import auto, t5
from stages.encoders.packed.decoder import PackedDecoder
from tests.commands import Result, precompute
from tests.runs import store_bytes
from tests.stages.encoders import tiny_models
from tests.stages.encoders.test_identity import CONFIG, NO_END, TOKENIZER, add_token, edit

MAKERS = {"t5": tiny_models.t5, "auto": tiny_models.llama}
CAPTIONS = [f"a red circle {'and a blue square ' * (i % 5)}{i}" for i in range(70)]


def resume(out: Path, kind: str, **changes: Any) -> Result:
    """`pipeline run precompute` of the captions with the model beside `out`."""
    table = out.parent / "captions.parquet"
    if not table.exists():
        pq.write_table(pa.table({"caption": CAPTIONS}), table)
    encoder = {"name": "text", "kind": kind, "model": str(out.parent / "model"), "compute_dtype": "float32"}
    source = {"kind": "parquet", "path": str(table), "image_column": None}
    settings = {"source": source, "images": {"sizes_px": []}, "encoders": [{**encoder, "num_gpus": 0, **changes}]}
    return precompute(out, *(f"{key}={json.dumps(value)}" for key, value in settings.items()), "shard_size=40")


@pytest.fixture
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run of which the second shard is yet to be encoded; `request.param` is the kind of its encoder."""
    tiny_models.write(MAKERS[request.param], tmp_path / "model")
    out = tmp_path / "run"
    assert resume(out, request.param).code == 0
    (out / "state" / "text-text" / "00001.json").unlink()
    return out


Change = Callable[[Path, pytest.MonkeyPatch], None]


def of_file(apply: Callable[[Path], None]) -> Change:
    return lambda model, monkeypatch: apply(model)


def after_loading(module: Any, change: Callable[[Any], None]) -> Change:
    """Changes a model each time its weights have been loaded."""

    def apply(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = module.load_weights

        def load_weights(*arguments: Any, **options: Any) -> Any:
            found = honest(*arguments, **options)
            change(found)
            return found

        monkeypatch.setattr(module, "load_weights", load_weights)

    return apply


def zero_embedding(model: Any) -> None:
    model.get_input_embeddings().weight.data.zero_()


def other_attention(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another implementation of attention, which scales its scores otherwise."""
    honest = torch.nn.functional.scaled_dot_product_attention
    other = lambda *arguments, **options: honest(*arguments, **{**options, "scale": 0.9})  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other)


def patched_forward(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PackedDecoder.__call__
    monkeypatch.setattr(PackedDecoder, "__call__", lambda self, *inputs, **more: honest(self, *inputs, **more) * 1.01)


MODEL_CONFIG = "text-text.fingerprint.model_config"
TOKENIZER_STATE = "text-text.fingerprint.tokenizer"
CHANGES: dict[str, tuple[str, Change, str]] = {
    "rope theta": (
        "auto",
        of_file(edit(CONFIG, rope_parameters__rope_theta=5.0)),
        f"{MODEL_CONFIG}.rope_parameters.rop",
    ),
    "norm": ("auto", of_file(edit(CONFIG, rms_norm_eps=1e-3)), f"{MODEL_CONFIG}.rms_norm_eps: "),
    "norm of T5": (
        "t5",
        of_file(edit(CONFIG, layer_norm_epsilon=1e-3)),
        f"{MODEL_CONFIG}.layer_norm_epsilon: (absent",
    ),
    "activation": ("auto", of_file(edit(CONFIG, hidden_act="relu")), f"{MODEL_CONFIG}.hidden_act: silu -> relu"),
    "heads": ("t5", of_file(edit(CONFIG, num_heads=2)), f"{MODEL_CONFIG}.num_heads: 4 -> 2"),
    "tie": ("auto", of_file(edit(CONFIG, tie_word_embeddings=True)), f"{MODEL_CONFIG}.tie_word_embeddings: "),
    "added token": ("t5", of_file(add_token), f"{TOKENIZER_STATE}.added_tokens.number: 3 -> 4"),
    "post-processor": (
        "t5",
        of_file(edit(TOKENIZER, post_processor=NO_END)),
        f"{TOKENIZER_STATE}.post_processor.single.1: {{",
    ),
    "attention": ("t5", other_attention, "encoders.text: the same model gives other numbers"),
    "attention of a language model": ("auto", other_attention, "encoders.text: the same model gives other numbers"),
    "forward": ("auto", patched_forward, 'encoders.text: text-text/null.safetensors: the encoding of "" differs by'),
    "zeroed embedding of T5": ("t5", after_loading(t5, zero_embedding), 'the encoding of "" differs by'),
    "zeroed embedding": ("auto", after_loading(auto, zero_embedding), 'the encoding of "" differs by'),
}


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "change", "says"), list(CHANGES.values()), ids=list(CHANGES), indirect=["begun"])
def test_a_resumed_run_refuses_another_encoder_and_names_what_differs(
    begun: Path, change: Change, says: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store_bytes(begun)
    change(begun.parent / "model", monkeypatch)
    refused = resume(begun, request.node.callspec.params["begun"])
    assert refused.code == 2, refused.err
    assert len([line for line in refused.err.splitlines() if says in line]) == 1, refused.err
    assert store_bytes(begun) == before


@pytest.mark.slow
@pytest.mark.parametrize("begun", MAKERS, indirect=True)
def test_no_run_is_refused_for_its_batches_or_threads(begun: Path, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["begun"]
    for captions in (1, 8, 64):
        for threads in (1, 2):
            (begun / "state" / "text-text" / "00001.json").unlink(missing_ok=True)
            resumed = resume(begun, kind, tokens_per_batch=captions * 32, cpu_threads=threads)
            assert resumed.code == 0, resumed.err
    torch.set_num_threads(1)
