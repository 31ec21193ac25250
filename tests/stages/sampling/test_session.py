"""What a sampling reads in place of a dropped caption."""

from dataclasses import replace

import pytest

from imagen_core.cascade import Cascade
from pipeline.errors import ConfigError
from stages.sampling.cascade import LoadedCascade
from stages.sampling.session import _negative_prompt
from tests.imagen_core.test_cascade import ENCODER, stage


def test_it_is_the_negative_prompt_else_the_empty_one_where_a_stage_needs_it() -> None:
    plain, needs = stage(8), stage(16, 8)
    unet = needs.config.unet.model_copy(update={"dropped_caption": "empty_caption"})
    needs.denoiser.config = needs.config.model_copy(update={"unet": unet})
    for stages, given, expected in (
        ([plain], None, None),
        ([plain], "blurry", "blurry"),
        ([plain, needs], None, ""),
        ([plain, needs], "blurry", "blurry"),
    ):
        assert _negative_prompt(LoadedCascade(Cascade(stages, ENCODER), []), given) == expected


def test_a_negative_prompt_that_no_stage_reads_is_refused() -> None:
    loaded = LoadedCascade(Cascade([replace(stage(8))]), [])
    with pytest.raises(ConfigError, match="negative_prompt: is 'blurry', but the stages read no captions as tokens"):
        _negative_prompt(loaded, "blurry")
