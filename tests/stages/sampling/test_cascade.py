"""Which checkpoints make a cascade together."""

from pathlib import Path
from typing import Any

import pytest

from imagen_core.train.checkpoints.checkpoint import write_checkpoint
from pipeline.errors import ConfigError
from stages.sampling.cascade import load_cascade
from stages.sampling.config import SampleStageConfig
from tests.imagen_core.test_cascade import DIM, stage

FLOAT32 = {"name": "t5", "dim": DIM, "dtype": "float32", "fingerprint": {"model": "t5", "compute_dtype": "float32"}}
HALF = FLOAT32 | {"dtype": "float16", "fingerprint": {"model": "t5", "compute_dtype": "bfloat16"}}
OTHER = FLOAT32 | {"fingerprint": {"model": "another", "compute_dtype": "float32"}}


def save(folder: Path, sizes: tuple[int, int | None], step: int, encoder: dict[str, Any]) -> SampleStageConfig:
    denoiser = stage(*sizes).denoiser
    state = {"samples": step, "ema_updates": 0, "loader": None, "config": {"max_tokens": 12}, "encoder": encoder}
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
