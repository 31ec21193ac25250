"""Which checkpoints make a cascade together."""

from pathlib import Path
from typing import Any

import pytest

from imagen_core.cascade import SamplingConfig
from imagen_core.diffusion import Guidance
from imagen_core.train.checkpoints.checkpoint import write_checkpoint
from pipeline.errors import ConfigError
from stages.sampling.cascade import load_cascade
from stages.sampling.config import GuideConfig, SampleStageConfig
from tests.imagen_core.test_cascade import DIM, stage

FLOAT32 = {"name": "t5", "dim": DIM, "dtype": "float32", "fingerprint": {"model": "t5", "compute_dtype": "float32"}}
HALF = FLOAT32 | {"dtype": "float16", "fingerprint": {"model": "t5", "compute_dtype": "bfloat16"}}
OTHER = FLOAT32 | {"fingerprint": {"model": "another", "compute_dtype": "float32"}}


def save(
    folder: Path, sizes: tuple[int, int | None], step: int, encoder: dict[str, Any], max_tokens: int = 12
) -> SampleStageConfig:
    denoiser = stage(*sizes).denoiser
    state = {
        "samples": step,
        "ema_updates": 0,
        "loader": None,
        "config": {"max_tokens": max_tokens},
        "encoder": encoder,
    }
    state["denoiser"] = denoiser.config.model_dump(mode="json")
    write_checkpoint(folder / "checkpoints", step, {"model": denoiser.state_dict()}, state)
    return SampleStageConfig(checkpoint=str(folder))


@pytest.mark.parametrize("imported", [0, 1])
def test_an_imported_stage_goes_with_one_that_was_trained_on_other_types(tmp_path: Path, imported: int) -> None:
    records = [HALF, HALF]
    records[imported] = FLOAT32
    steps = [int(number != imported) for number in range(2)]
    stages = [
        save(tmp_path / str(size), (size, low), step, record)
        for size, low, step, record in zip((8, 16), (None, 8), steps, records, strict=True)
    ]
    assert load_cascade(stages).cascade.encoder == records[0]


@pytest.mark.parametrize(
    ("step", "record", "words"),
    [(0, OTHER, "fingerprint.model: .*another"), (1, HALF, "dtype: .*float16.*; fingerprint.compute_dtype")],
    ids=["an import of another encoder", "two trained on other types"],
)
def test_stages_of_different_encoders_are_refused(
    tmp_path: Path, step: int, record: dict[str, Any], words: str
) -> None:
    stages = [save(tmp_path / "8", (8, None), 1, FLOAT32), save(tmp_path / "16", (16, 8), step, record)]
    with pytest.raises(ConfigError, match=f"stages.1.checkpoint: was trained with another encoder .*{words}"):
        load_cascade(stages)


def with_guide(stage: SampleStageConfig, guide: SampleStageConfig) -> SampleStageConfig:
    return stage.model_copy(update={"guide": GuideConfig(checkpoint=guide.checkpoint)})


def test_a_stage_has_its_own_guide_whose_origin_is_recorded(tmp_path: Path) -> None:
    base, upsampler = save(tmp_path / "8", (8, None), 2, HALF), save(tmp_path / "16", (16, 8), 2, HALF)
    guides = [save(tmp_path / "guide-8", (8, None), 1, HALF), save(tmp_path / "guide-16", (16, 8), 1, HALF)]
    plain = load_cascade([base, upsampler])
    assert all("guide" not in origin for origin in plain.origins)
    loaded = load_cascade([with_guide(base, guides[0]), upsampler])
    assert [stage.guide is not None for stage in loaded.cascade.stages] == [True, False]
    assert loaded.origins[0] == plain.origins[0] | {"guide": load_cascade(guides[:1]).origins[0]}
    assert loaded.origins[1] == plain.origins[1]
    load_cascade([with_guide(base, guides[0]), with_guide(upsampler, guides[1])])


@pytest.mark.parametrize(
    ("sizes", "record", "max_tokens", "words"),
    [
        ((8, None), OTHER, 12, "stages.0.guide.checkpoint: does not read what .* fingerprint.model: .*another"),
        ((8, None), HALF, 5, "stages.0.guide.checkpoint: does not read .*: max_tokens 12 -> 5; take a guide that"),
        ((16, None), HALF, 12, "stages: the 8 px stage: its guide has another size_px: 16, and not 8; take a guide"),
        ((8, 4), HALF, 12, "stages: the 8 px stage: its guide has another low_res_px: 4, and not None"),
    ],
    ids=["encoder", "tokens", "size", "condition"],
)
def test_a_guide_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, sizes: tuple[int, int | None], record: dict[str, Any], max_tokens: int, words: str
) -> None:
    guide = save(tmp_path / "guide", sizes, 1, record, max_tokens)
    with pytest.raises(ConfigError, match=words):
        load_cascade([with_guide(save(tmp_path / "8", (8, None), 1, HALF), guide)])


def test_a_weight_against_a_guide_that_is_missing_is_refused(tmp_path: Path) -> None:
    sampling = SamplingConfig(guidance=Guidance(autoguidance=2.0))
    alone = save(tmp_path / "8", (8, None), 1, HALF).model_copy(update={"sampling": sampling})
    with pytest.raises(
        ConfigError, match=r"guidance.autoguidance is 2, but the stage has no guide; name a worse model"
    ):
        load_cascade([alone])
    prior = SampleStageConfig(checkpoint=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"stages.0.guide.checkpoint: .*none: has no checkpoint"):
        load_cascade([with_guide(alone, prior)])


def test_settings_without_a_guide_are_recorded_as_ever() -> None:
    recorded = SampleStageConfig(checkpoint="there").model_dump(mode="json")
    assert "guide" not in recorded
    assert "autoguidance" not in recorded["sampling"]["guidance"]
