"""The exported pipeline's call: what it takes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imagen_core.cascade import Cascade, SamplingConfig
from stages.sampling.cascade import LoadedCascade, load_cascade
from stages.sampling.config import SampleStageConfig
from stages.sampling.diffusers.export import write_folder
from tests.stages.sampling.diffusers.models import EFFICIENT, ENCODER, SUPER, TEXT_DIM, denoiser, save

pytestmark = pytest.mark.slow  # diffusers takes seconds to import

SUPER_EFFICIENT = EFFICIENT | SUPER
LOW_RES = {"low_res_px": 8, "low_res_noise": {"kind": "lognormal"}}


def opened(folder: Path, **settings: Any) -> Any:
    """The pipeline of an exported folder, with the code of this checkout."""
    from stages.sampling.diffusers.files.network import Network
    from stages.sampling.diffusers.files.pipeline import CascadePipeline

    stages = {}
    for place in sorted(folder.glob("stage_*")):
        config = json.loads((place / "config.json").read_text())
        network = Network(**{name: value for name, value in config.items() if not name.startswith("_")})
        network.load_state_dict(load_file(place / "diffusion_pytorch_model.safetensors"))
        stages[place.name] = network
    pipe = CascadePipeline(**stages, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> LoadedCascade:
    """A super-resolution stage alone, 8 -> 16 px, that reads captions."""
    folder = tmp_path_factory.mktemp("stage")
    place = save(folder / "sr", denoiser(SUPER_EFFICIENT, **LOW_RES), ENCODER)
    sampling = SamplingConfig.model_validate(
        {"num_steps": 3, "guidance": {"text": 8.0}, "threshold": {"kind": "none"}}
    )
    return load_cascade([SampleStageConfig(checkpoint=place, sampling=sampling)])


@pytest.fixture(scope="module")
def pipe(cascade: LoadedCascade, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("folder") / "out"
    write_folder(cascade, folder, None)
    return opened(folder)


TEXT = torch.randn(2, 4, TEXT_DIM, generator=torch.Generator().manual_seed(1))
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
SMALL = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1


def expected(cascade: Cascade, seeds: list[int], **options: Any) -> torch.Tensor:
    return cascade.sample(list(TEXT), seeds, low_res=SMALL, **options)[16] / 2 + 0.5


def test_images_of_pillow_and_tensors_are_super_resolved_alike(pipe: Any, cascade: LoadedCascade) -> None:
    images = expected(cascade.cascade, [4, 5])
    for small in (SMALL, [Image.fromarray(each) for each in PIXELS]):
        found = pipe(prompt_embeds=TEXT, image=small, seed=4, output_type="pt").images
        torch.testing.assert_close(found, images, atol=1e-4, rtol=0)


def test_guidance_in_the_call_takes_the_place_of_that_of_the_stages(pipe: Any, cascade: LoadedCascade) -> None:
    (stage,) = cascade.cascade.stages
    unguided = SamplingConfig.model_validate({"num_steps": 3, "threshold": {"kind": "none"}})
    images = expected(Cascade([type(stage)(stage.denoiser, unguided, stage.max_tokens)], ENCODER), [0, 1])
    found = pipe(prompt_embeds=TEXT, image=SMALL, seed=0, guidance_scale=1.0, output_type="pt").images
    torch.testing.assert_close(found, images, atol=1e-4, rtol=0)
    assert float((found - expected(cascade.cascade, [0, 1])).abs().max()) > 1e-2


def test_a_generator_decides_the_images_as_a_seed_does(pipe: Any) -> None:
    def images(**options: Any) -> torch.Tensor:
        return pipe(prompt_embeds=TEXT, image=SMALL, output_type="pt", **options).images

    first = images(generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, images(generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, images(generator=torch.Generator().manual_seed(4)))
    assert not torch.equal(images(), images())
    alone = images(generator=[torch.Generator().manual_seed(each) for each in (8, 9)])
    both = images(generator=[torch.Generator().manual_seed(each) for each in (9, 9)])
    torch.testing.assert_close(alone[1], both[1])


def test_several_images_of_a_prompt_have_seeds_of_their_own(pipe: Any, cascade: LoadedCascade) -> None:
    found = pipe(prompt_embeds=TEXT, image=SMALL, seed=0, num_images_per_prompt=2, output_type="pt").images
    torch.testing.assert_close(found[::2], expected(cascade.cascade, [0, 2]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1::2], expected(cascade.cascade, [1, 3]), atol=1e-4, rtol=0)


def test_a_negative_prompt_takes_the_place_of_the_dropped_caption(pipe: Any, cascade: LoadedCascade) -> None:
    negative = torch.randn(6, TEXT_DIM, generator=torch.Generator().manual_seed(2))
    images = expected(cascade.cascade, [0, 1], null_text=negative)
    for given in (negative[None], [negative, negative]):
        found = pipe(prompt_embeds=TEXT, negative_prompt_embeds=given, image=SMALL, seed=0, output_type="pt").images
        torch.testing.assert_close(found, images, atol=1e-4, rtol=0)
    assert float((images - expected(cascade.cascade, [0, 1])).abs().max()) > 1e-2


def test_a_cascade_whose_dropped_caption_is_the_empty_one_asks_for_it(tmp_path: Path) -> None:
    place = save(tmp_path / "base", denoiser(EFFICIENT | {"dropped_caption": "empty_caption"}), ENCODER)
    sampling = SamplingConfig.model_validate({"num_steps": 2, "guidance": {"text": 2.0}})
    loaded = load_cascade([SampleStageConfig(checkpoint=place, sampling=sampling)])
    write_folder(loaded, tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["empty_caption"] is True
    pipe = opened(tmp_path / "out", empty_caption=True)
    with pytest.raises(ValueError, match="negative_prompt_embeds: give the embedding of the empty prompt"):
        pipe(prompt_embeds=TEXT)
    assert len(pipe(prompt_embeds=TEXT, guidance_scale=1.0).images) == 2
    found = pipe(prompt_embeds=TEXT, negative_prompt_embeds=TEXT[:1, :2], seed=0, output_type="pt").images
    images = loaded.cascade.sample(list(TEXT), [0, 1], null_text=TEXT[0, :2])[16] / 2 + 0.5
    torch.testing.assert_close(found, images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": SMALL}, "give either prompt or prompt_embeds"),
        ({"prompt": "a fox", "image": SMALL[:1]}, "this folder has no text encoder"),
        ({"prompt_embeds": TEXT}, "the first stage super-resolves images: give image"),
        ({"prompt_embeds": TEXT, "image": SMALL[:1]}, "give one for each of 2 prompts"),
        ({"prompt_embeds": TEXT[..., :5], "image": SMALL}, r"\[5\] wide, this cascade reads \[24\]"),
        (
            {"prompt_embeds": TEXT, "image": SMALL, "negative_prompt_embeds": TEXT[:, :1].repeat(2, 1, 1)},
            "give one for",
        ),
        ({"prompt_embeds": TEXT, "image": SMALL, "seed": [1]}, "1 for 2 images; give one for each"),
        ({"prompt_embeds": TEXT, "image": SMALL, "height": 17}, "which needs multiples of 2 px"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**options)
