"""What records of samplings and likelihoods say of a checkpoint: everything that decides what it generates."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest

from imagen_core.diffusion import DenoiserConfig
from imagen_core.train import LoadedDenoiser
from pipeline.fingerprint import canonical_json
from stages.checkpoints.load import comparable_origin, origin
from tests.trained import UNET

CONFIG = DenoiserConfig.model_validate({"size_px": 16, "unet": UNET})
OTHER: dict[str, Any] = {
    "denoiser": SimpleNamespace(config=CONFIG.model_copy(update={"size_px": 32})),
    "encoder": {"name": "t5", "fingerprint": {"max_tokens": 9}},
    "embed_encoders": {"image_embed": {"name": "clip", "fingerprint": {"output": "pooled"}}},
    "step": 3,
    "weights": "model",
    "sha256": "1" * 64,
    "max_tokens": 9,
    "condition_images": {"depth": 1},
}
"""Another value of each field of a loaded checkpoint that decides what it generates."""
ELSEWHERE = ("shapes", "place")
"""Fields that an origin leaves out: the shape of each image is recorded with it, and a checkpoint may be moved."""


def loaded() -> Any:
    encoder = {"name": "t5", "fingerprint": {"max_tokens": 8}}
    return LoadedDenoiser(SimpleNamespace(config=CONFIG), encoder, {}, 2, "ema-0.99", "0" * 64, 8)  # pyright: ignore


@pytest.mark.parametrize("name", [field.name for field in fields(LoadedDenoiser) if field.name not in ELSEWHERE])
def test_another_value_of_anything_that_was_loaded_is_another_origin(name: str) -> None:
    assert canonical_json(origin(loaded())) == canonical_json(origin(loaded()))
    assert origin(replace(loaded(), **{name: OTHER[name]})) != origin(loaded())


def test_a_checkpoint_that_was_moved_has_the_same_origin() -> None:
    assert origin(replace(loaded(), place="s3://bucket/base")) == origin(loaded())


def test_records_of_earlier_versions_are_compared_by_what_they_have() -> None:
    now = origin(loaded())
    earlier = {name: now[name] for name in ("step", "weights", "sha256")}
    assert comparable_origin(now, earlier) == earlier
    assert comparable_origin(now, {**now, "step": 3}) == now
    assert comparable_origin(now, None) == now
