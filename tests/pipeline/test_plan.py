"""The names of stages in fingerprints."""

import pytest

from pipeline.plan import Plan
from pipeline.stage import Group, Stage, Task
from stages.precompute.encode_images import EncodeImagesStage
from stages.precompute.encode_text import EncodeStage
from stages.precompute.fetch import FetchStage
from stages.precompute.given_embeddings import PrecomputedEmbeddingsStage
from stages.precompute.resize import ResizeStage


class Upscale(Stage):
    name = "upscale"
    groups = (Group("images-512", {"size_px": 512}),)

    def process(self, task: Task) -> None: ...


class ResizeForAnotherCluster(ResizeStage): ...


def identity_in_fingerprint(stage: Stage) -> object:
    plan = Plan((stage,), lambda: iter(()), lambda *_: {})
    return plan.fingerprints["images-512"]["stage"]


@pytest.mark.parametrize(
    ("stage_class", "identity"),
    [
        (FetchStage, "FetchStage"),
        (ResizeStage, "ResizeStage"),
        (EncodeStage, "EncodeStage"),
        (EncodeImagesStage, "EncodePicturesStage"),
        (PrecomputedEmbeddingsStage, "TakeGivenStage"),
    ],
)
def test_the_identities_in_fingerprints_of_existing_runs_stay(stage_class: type[Stage], identity: str) -> None:
    assert stage_class.identity == identity


def test_a_stage_of_another_package_without_an_identity_gets_the_name_of_its_class() -> None:
    assert identity_in_fingerprint(Upscale()) == "Upscale"
    assert ResizeForAnotherCluster.identity == "ResizeForAnotherCluster"


def test_the_identity_and_not_the_class_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Upscale, "identity", "EnlargeStage")
    assert identity_in_fingerprint(Upscale()) == "EnlargeStage"
