"""`verify --reencode --encoder`: whether the stated encoder made embeddings that came with the data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTextEncoding, AutoTokenizer

from imagen_core.store import Store
from stages.encoders.tiny import write_tiny_model
from tests.commands import Result, call
from tests.images import plain_png
from tests.runs import precompute

CAPTIONS = ("a red fox in the snow", "two cats", "an owl at night, painted")
PADDED = 40


def write_cache(images: Path, model: Path, *, masked: bool) -> None:
    """What sd-scripts writes of a T5: all its padded states, and whether it was given the mask."""
    images.mkdir()
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModelForTextEncoding.from_pretrained(model)
    for number, caption in enumerate(CAPTIONS):
        (images / f"{number}.png").write_bytes(plain_png())
        (images / f"{number}.txt").write_text(caption)
        padding = {"padding": "max_length", "max_length": PADDED, "truncation": True}
        tokens = tokenizer([caption], return_tensors="pt", **padding)
        with torch.no_grad():
            mask = tokens.attention_mask if masked else torch.ones_like(tokens.attention_mask)
            states = encoder(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state
        np.savez(
            images / f"{number}_flux_te.npz",
            l_pooled=np.zeros(4, np.float32),
            t5_out=states[0].numpy(),
            txt_ids=np.zeros((PADDED, 3), np.float32),
            t5_attn_mask=tokens.attention_mask[0].numpy(),
            apply_t5_attn_mask=masked,
        )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_tiny_model(folder)
    return folder


def store_of(tmp_path: Path, model: Path, *, masked: bool, pads: str = "cut") -> Path:
    write_cache(tmp_path / "images", model, masked=masked)
    array = f"{{kind: kohya, model: flux, array: t5_out, apply_attn_mask: {str(masked).lower()}, pads: {pads}}}"
    precompute(
        tmp_path / "run",
        *("source.kind=folder", f"source.path={tmp_path / 'images'}", f"source.arrays={{t5: {array}}}"),
        *("images.sizes_px=[]", "store.dtype=float32"),
        "encoders=[{name: text, kind: given, array: t5, model: tiny, dim: 64}]",
    )
    return tmp_path / "run"


def verified(run: Path, *options: str) -> tuple[Result, dict[str, Any]]:
    result = call("verify", str(run), "--json", "--reencode", "1", *options)
    return result, json.loads(result.out or "{}")


def stated(model: Path, **more: object) -> str:
    settings = {"kind": "t5", "model": model, "max_tokens": PADDED, "compute_dtype": "float32", **more}
    return "text={" + ", ".join(f"{name}: {value}" for name, value in settings.items()) + "}"


@pytest.mark.slow
def test_the_encoder_that_made_a_cache_agrees_with_it(tmp_path: Path, model: Path) -> None:
    run = store_of(tmp_path, model, masked=True)
    result, found = verified(run, "--encoder", stated(model))
    assert (result.code, found["ok"]) == (0, True)
    comparison = found["reencoded"]["text"]
    assert comparison["captions"] == len(CAPTIONS)
    assert comparison["tokens"] == sum(len(sample.text["text"][0]) for sample in Store.open(run / "store"))
    assert comparison["max_relative_error"] < 1e-4
    (tmp_path / "encoder.yaml").write_text(f"kind: t5\nmodel: {model}\nmax_tokens: {PADDED}\n")
    again, found = verified(run, "--encoder", f"text={tmp_path / 'encoder.yaml'}")
    assert (again.code, found["reencoded"]["text"]["captions"]) == (0, len(CAPTIONS))


def test_a_cache_that_was_made_without_the_mask_differs_from_the_encoder_with_it(tmp_path: Path, model: Path) -> None:
    run = store_of(tmp_path, model, masked=False)
    result, found = verified(run, "--encoder", stated(model))
    assert result.code == 1
    assert len(found["problems"]) == len(CAPTIONS)
    assert "encoded again, a token differs by" in found["problems"][0]["message"]


def test_kept_pads_agree_with_a_recipe_that_encodes_them(tmp_path: Path, model: Path) -> None:
    run = store_of(tmp_path, model, masked=False, pads="keep")
    result, found = verified(run, "--encoder", stated(model, pads=f"{{to: {PADDED}, mode: encoded}}"))
    assert (result.code, found["reencoded"]["text"]["tokens"]) == (0, PADDED * len(CAPTIONS))


def test_another_length_or_width_is_found(tmp_path: Path, model: Path) -> None:
    run = store_of(tmp_path, model, masked=True)
    result, found = verified(run, "--encoder", stated(model, max_tokens=3))
    assert result.code == 1
    assert "3 tokens of 64 when encoded again" in found["problems"][0]["message"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("text", "give NAME=CONFIG"),
        ("t5={kind: t5, model: x}", "--encoder t5=...: is for embeddings that came with the data, which are ['text']"),
        ("text={kind: t5, model: x, max_token: 3}", "--encoder text=...: encoder.max_token"),
        ("text=nowhere.yaml", "config file nowhere.yaml: cannot be read"),
        ("text={kind: t5", "not valid YAML"),
    ],
)
def test_what_cannot_be_an_encoder_is_refused(tmp_path: Path, model: Path, option: str, message: str) -> None:
    run = store_of(tmp_path, model, masked=True)
    result, _ = verified(run, "--encoder", option)
    assert (result.code, message in result.err) == (2, True), result.err
    alone = call("verify", str(run), "--encoder", stated(model))
    assert (alone.code, "goes with --reencode FRACTION" in alone.err) == (2, True)


def test_without_a_stated_encoder_nothing_is_encoded_and_the_option_is_named(tmp_path: Path, model: Path) -> None:
    run = store_of(tmp_path, model, masked=True)
    result = call("verify", str(run), "--reencode", "1")
    assert result.code == 0
    assert "nothing was encoded again" in result.out
    assert "--encoder NAME=CONFIG says what made them" in result.out
