"""A cascade of small, untrained stages with the weights of every layer sampled at random."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.diffusion import Denoiser, DenoiserConfig, DiffusionConfig
from imagen_core.diffusion.schedules import Discrete
from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.layers.inference import optimize_for_cpu
from imagen_core.samplers import Inpaint
from imagen_core.text_batch import pad_text
from tests.imagen_core.models.small import random_weights

DIM = 12
ENCODER = {"name": "t5", "dim": DIM, "dtype": "float16", "fingerprint": {}}


def stage(
    size_px: int, low_res_px: int | None = None, *, writing: dict[str, object] | None = None, **sampling: object
) -> CascadeStage:
    unet = {
        "transcription": writing,
        "family": "efficient",
        "image_size_px": size_px,
        "embed_dim": 32,
        "channel_mult": [1, 1],
        "num_res_blocks": [1, 1],
        "attention_levels": [False, True],
        "head_dim": 16,
        "text_dim": DIM,
        "low_res": low_res_px is not None,
        "low_res_noise": low_res_px is not None,
    }
    config = {"unet": unet, "size_px": size_px, "low_res_px": low_res_px}
    if low_res_px is not None:
        config["low_res_noise"] = {"kind": "lognormal"}
    denoiser = random_weights(Denoiser(DenoiserConfig.model_validate(config)).double()).eval()
    return CascadeStage(
        denoiser, SamplingConfig.model_validate({"num_steps": 3, "guidance": {"text": 2.0}} | sampling)
    )


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade([stage(8), stage(16, 8), stage(32, 16)], ENCODER)


def caption(index: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal((2 + index, DIM)).astype(np.float16)


def generate(cascade: Cascade, indices: list[int], **more: object) -> dict[int, Tensor]:
    arguments = {"dtype": torch.float64} | more
    return cascade.sample([caption(i) for i in indices], [100 + i for i in indices], **arguments)  # type: ignore[arg-type]


def test_all_stages_are_returned_in_range(cascade: Cascade) -> None:
    images = generate(cascade, [0, 1])
    assert {size: tuple(p.shape) for size, p in images.items()} == {
        8: (2, 3, 8, 8),
        16: (2, 3, 16, 16),
        32: (2, 3, 32, 32),
    }
    assert all(float(p.abs().max()) <= 1 for p in images.values())


def test_an_image_does_not_depend_on_its_batch(cascade: Cascade) -> None:
    alone, together = generate(cascade, [3]), generate(cascade, [1, 3, 5])
    for size in cascade.sizes_px:
        torch.testing.assert_close(together[size][1], alone[size][0], rtol=0, atol=1e-8)


def test_seeds_and_captions_matter(cascade: Cascade) -> None:
    text = [caption(0), caption(0), caption(1)]
    first, other_seed, other_caption = cascade.sample(text, [1, 2, 1], dtype=torch.float64)[8]
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, other_caption)


def test_captions_are_truncated_as_in_training(cascade: Cascade) -> None:
    cut = Cascade([replace(stage, max_tokens=3) for stage in cascade.stages], ENCODER)
    short = cascade.sample([caption(9)[:3]], [0], dtype=torch.float64)
    for size, image in cut.sample([caption(9)], [0], dtype=torch.float64).items():
        torch.testing.assert_close(image, short[size])


def test_a_cascade_stops_early_and_continues_from_there(cascade: Cascade) -> None:
    whole = generate(cascade, [0, 1])
    base = generate(cascade, [0, 1], stop_stage=1)
    assert list(base) == [8]
    rest = generate(cascade, [0, 1], start_stage=1, low_res=base[8])
    assert list(rest) == [16, 32]
    torch.testing.assert_close(rest[32], whole[32])


def test_a_cascade_super_resolves_an_image_of_any_size(cascade: Cascade) -> None:
    image = torch.rand(1, 3, 11, 11, dtype=torch.float64) * 2 - 1
    upsampled = generate(cascade, [0], start_stage=1, stop_stage=2, low_res=image)
    assert upsampled[16].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="needs a low-resolution image"):
        generate(cascade, [0], start_stage=1)


def test_the_images_of_all_stages_have_the_ratio_asked_for(cascade: Cascade) -> None:
    wide = generate(cascade, [0, 1], shape=(6, 10))
    assert [tuple(image.shape[2:]) for image in wide.values()] == [(6, 10), (12, 20), (24, 40)]
    assert cascade.shapes((6, 10)) == [(6, 10), (12, 20), (24, 40)]
    torch.testing.assert_close(generate(cascade, [1], shape=(6, 10))[32][0], wide[32][1], rtol=0, atol=1e-8)
    rest = generate(cascade, [0, 1], start_stage=1, low_res=wide[8])
    torch.testing.assert_close(rest[32], wide[32])
    square = generate(cascade, [0], shape=(8, 8))
    assert all(torch.equal(image, square[size]) for size, image in generate(cascade, [0]).items())
    with pytest.raises(ValueError, match=r"images of 6 x 9 px in the first stage are 6 x 9 px in the stage of 8 px"):
        generate(cascade, [0], shape=(6, 9))
    with pytest.raises(ValueError, match="needs multiples of 2 px"):
        generate(cascade, [0], shape=(0, 8))


def test_inpainting_and_image_to_image_follow_the_ratio() -> None:
    base = Cascade([stage(8), stage(16, 8)], ENCODER)
    image = torch.rand(1, 3, 12, 20, dtype=torch.float64) * 2 - 1
    keep = torch.ones(1, 1, 12, 20, dtype=torch.bool)
    kept = generate(base, [0], shape=(6, 10), inpaint=Inpaint(image, keep, 1))
    torch.testing.assert_close(kept[16], image)
    started = generate(base, [0], shape=(6, 10), stop_stage=1, init_image=kept[8], strength=0.0)
    torch.testing.assert_close(started[8], kept[8])


def test_image_to_image_keeps_the_image_at_strength_0() -> None:
    base = Cascade([stage(8)], ENCODER)
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64) * 2 - 1
    kept = generate(base, [0], init_image=image, strength=0.0)
    torch.testing.assert_close(kept[8], image)
    assert not torch.equal(generate(base, [0], init_image=image, strength=0.7)[8], image)


def test_inpainting_keeps_the_kept_part_at_every_stage(cascade: Cascade) -> None:
    start = torch.full((1, 3, 32, 32), 0.25, dtype=torch.float64)
    keep = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    keep[..., :16] = True
    images = generate(cascade, [0], inpaint=Inpaint(start, keep, 2))
    for size, image in images.items():
        torch.testing.assert_close(image[..., : size // 2], torch.full_like(image[..., : size // 2], 0.25))


def test_without_captions_guidance_has_no_effect() -> None:
    plain = Cascade([stage(8, guidance={"text": 1.0})], ENCODER).sample(None, [5], dtype=torch.float64)[8]
    guided = Cascade([stage(8, guidance={"text": 4.0})], ENCODER).sample(
        [np.zeros((0, DIM), np.float32)], [5], dtype=torch.float64
    )[8]
    torch.testing.assert_close(plain, guided)


@pytest.mark.parametrize(
    "setting",
    [
        {"guidance": {"text": 4.0}},
        {"guidance": {"text": 2.0, "low_res": 3.0}},
        {"sampler": {"kind": "ddim"}},
        {"grid": {"kind": "karras", "rho": 2}},
        {"threshold": {"kind": "none"}},
        {"num_steps": 2},
        {"low_res_sigma": 0.4},
    ],
    ids=str,
)
def test_each_stage_has_its_own_settings(cascade: Cascade, setting: dict[str, object]) -> None:
    base, upsampling = cascade.stages[:2]
    settings = SamplingConfig.model_validate(upsampling.sampling.model_dump() | setting)
    plain = generate(Cascade([base, upsampling], ENCODER), [0])
    changed = generate(Cascade([base, replace(upsampling, sampling=settings)], ENCODER), [0])
    torch.testing.assert_close(changed[8], plain[8], rtol=0, atol=0)
    assert not torch.allclose(changed[16], plain[16], rtol=1e-3, atol=1e-3)


def test_each_stage_visits_the_levels_of_its_own_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = [Discrete(num_steps=steps, beta=beta) for steps, beta in ((4, "cosine"), (3, "jsd"))]
    stages = []
    for one, schedule in zip((stage(8), stage(16, 8)), schedules, strict=True):
        config = one.config.model_copy(update={"diffusion": DiffusionConfig(schedule=schedule, objective="v")})
        sampling = {"sampler": {"kind": "ddim"}, "grid": {"kind": "uniform"}, "num_steps": schedule.num_steps}
        stages.append(CascadeStage(Denoiser(config).double(), SamplingConfig.model_validate(sampling)))
    seen: dict[int, list[float]] = {8: [], 16: []}
    network = Denoiser.network

    def note(self: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        seen[x.shape[-1]].append(float(sigma[0]))
        return network(self, x, sigma, conditioning)

    monkeypatch.setattr(Denoiser, "network", note)
    generate(Cascade(stages, ENCODER), [0])
    for levels, schedule in zip(seen.values(), schedules, strict=True):
        assert levels == pytest.approx(schedule.sigmas().flip(0).tolist(), rel=1e-9)


def test_one_stage_at_a_time_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpu:0 stands for the device and cpu for main memory: one place under two names."""
    two = Cascade([stage(8), stage(16, 8)], ENCODER)
    number = {id(stage.denoiser): index for index, stage in enumerate(two.stages)}
    events: list[tuple[object, ...]] = []
    move = Denoiser.to

    def note(self: Denoiser, device: torch.device | str, dtype: torch.dtype | None = None) -> Denoiser:
        events.append((number[id(self)], str(device)))
        return move(self, device=device, dtype=dtype)

    monkeypatch.setattr(Denoiser, "to", note)
    generate(two, [0], device="cpu:0", on_step=lambda index, done, total, x: events.append((index, f"step {done}")))
    steps = [f"step {done}" for done in (1, 2, 3)]
    assert events == [(index, event) for index in (0, 1) for event in ("cpu:0", *steps, "cpu")]


def test_steps_are_reported() -> None:
    seen: list[tuple[int, int, int]] = []
    two = Cascade([stage(8), stage(16, 8, num_steps=2)], ENCODER)
    generate(two, [0], on_step=lambda number, done, total, x: seen.append((number, done, total)))
    assert seen == [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 2), (1, 2, 2)]


def test_sizes_must_rise() -> None:
    with pytest.raises(ValueError, match=r"sizes must rise .* \[16, 8\]"):
        Cascade([stage(16), stage(8)], ENCODER)
    with pytest.raises(ValueError, match="no stage to run"):
        Cascade([stage(8)], ENCODER).sample(None, [0], start_stage=1)


def test_text_is_padded_with_zeros() -> None:
    padded, mask = pad_text([caption(0), caption(2)], 2, (DIM,))
    assert padded is not None
    assert mask is not None
    assert padded.shape == (2, 4, DIM)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert float(padded[0, 2:].abs().max()) == 0
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        pad_text([caption(0)], 2, (DIM,))
    with pytest.raises(ValueError, match=r"embeddings \(got \(3, 5\)\)"):
        pad_text([np.zeros((3, 5))], 1, (DIM,))


def test_images_that_are_not_kept_are_not_super_resolved_and_the_others_are_the_same(cascade: Cascade) -> None:
    every, seen = generate(cascade, [0, 1, 2, 3]), []

    def keep(number: int, images: Tensor) -> Tensor:
        seen.append((number, images.clone()))
        return torch.tensor([True, False, True, True] if number == 0 else [False, True, True])

    kept = generate(cascade, [0, 1, 2, 3], keep=keep)
    rows = {8: [0, 1, 2, 3], 16: [0, 2, 3], 32: [2, 3]}
    for size, images in kept.items():
        torch.testing.assert_close(images, every[size][rows[size]], rtol=1e-9, atol=1e-9)
    assert [number for number, _ in seen] == [0, 1]
    torch.testing.assert_close(seen[1][1], every[16][[0, 2, 3]], rtol=1e-9, atol=1e-9)


def test_the_kept_part_of_an_image_stays_with_its_row(cascade: Cascade) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    inpaint = Inpaint(images, torch.ones(1, 1, 32, 32, dtype=torch.bool), resample_times=1)
    kept = generate(cascade, [0, 1, 2], inpaint=inpaint, keep=lambda number, p: torch.arange(len(p)) > 0)
    torch.testing.assert_close(kept[32], images[2:])


def test_when_nothing_is_kept_the_rest_does_not_run(cascade: Cascade) -> None:
    assert list(generate(cascade, [0, 1], keep=lambda number, p: torch.zeros(2, dtype=torch.bool))) == [8]


def test_keep_must_answer_for_every_image(cascade: Cascade) -> None:
    for answer in (torch.ones(1, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(ValueError, match="one bool for each of 2 images"):
            generate(cascade, [0, 1], keep=lambda number, p, answer=answer: answer)


WRITING: dict[str, object] = {
    "dim": 8,
    "depth": 1,
    "head_dim": 4,
    "max_characters": 4,
    "resolutions": [4],
    "gain": 1.0,
}


def test_transcriptions_reach_the_stages_that_read_them() -> None:
    reading = Cascade([stage(8, writing=WRITING | {"max_characters": 5}), stage(16, 8)], ENCODER)
    assert reading.max_characters == 5
    with_text = generate(reading, [0, 1], transcriptions=["AB", ""])
    other, none = generate(reading, [0, 1], transcriptions=["BA", ""]), generate(reading, [0, 1])
    assert not torch.equal(with_text[8][0], other[8][0])
    torch.testing.assert_close(with_text[16][1], other[16][1], rtol=0, atol=1e-8)
    torch.testing.assert_close(with_text[16][1], none[16][1], rtol=0, atol=1e-8)
    both = [reading.stages[0], stage(16, 8, writing=WRITING | {"resolutions": [8]})]
    assert Cascade(both, ENCODER).max_characters == 4


def test_the_transcription_has_its_own_weight() -> None:
    cascades = [
        Cascade([stage(8, writing=WRITING, guidance={"text": 0.0, "transcription": weight})], ENCODER)
        for weight in (0.0, 1.0, 4.0)
    ]
    ignored, plain, stressed = (generate(cascade, [0, 0], transcriptions=["AB", "CD"])[8] for cascade in cascades)
    none = generate(cascades[1], [0, 0])[8]
    torch.testing.assert_close(ignored, none, rtol=0, atol=1e-8)
    assert not torch.allclose(plain, none)
    assert not torch.allclose(plain, stressed)


def test_wrong_transcriptions_are_named(cascade: Cascade) -> None:
    reading = Cascade([stage(8, writing=WRITING)], ENCODER)
    with pytest.raises(ValueError, match="transcriptions: no stage reads them"):
        generate(cascade, [0], transcriptions=["A"])
    with pytest.raises(ValueError, match="transcriptions: 1 for 2 images"):
        generate(reading, [0, 1], transcriptions=["A"])
    with pytest.raises(ValueError, match="transcription 'ABCDE': 5 bytes in UTF-8, but the model reads at most 4"):
        generate(reading, [0], transcriptions=["ABCDE"])


def test_a_stage_that_reads_image_embeddings_reads_their_direction_and_refuses_to_do_without() -> None:
    plain = stage(8)
    unet = plain.config.unet.model_copy(update={"image_embed_dim": 6})
    config = plain.config.model_copy(update={"unet": unet})
    decoder = Cascade([CascadeStage(random_weights(Denoiser(config).double()).eval(), plain.sampling)], ENCODER)
    embed = torch.randn(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = generate(decoder, [0], image_embed=embed)[8]
    torch.testing.assert_close(generate(decoder, [0], image_embed=3 * embed)[8], image)
    assert not torch.allclose(generate(decoder, [0], image_embed=-embed)[8], image)
    with pytest.raises(ValueError, match=r"image_embed: the 8 px stage reads image embeddings \(1, 6\) \(got None"):
        generate(decoder, [0])


def test_a_noise_level_for_a_stage_trained_without_is_refused() -> None:
    quiet = stage(16, 8, low_res_sigma=0.1)
    settings = quiet.config.model_copy(update={"low_res_noise": None})
    quiet.denoiser.config = settings
    with pytest.raises(ValueError, match=r"the 16 px stage: low_res_sigma is 0.1, but it was not trained with noise"):
        Cascade([stage(8), quiet], ENCODER)


def test_settings_that_do_not_fit_a_stage_are_refused_before_sampling() -> None:
    with pytest.raises(ValueError, match=r"the 8 px stage: guidance.image_embed is 3, .* it reads text: leave it out"):
        Cascade([stage(8, guidance={"image_embed": 3})], ENCODER)
    with pytest.raises(ValueError, match=r"the 16 px stage: guidance.labels is 0, .* it reads low_res, text"):
        Cascade([stage(8), stage(16, 8, guidance={"labels": 0})], ENCODER)
    with pytest.raises(ValueError, match=r"the 8 px stage: grid.kind=respaced needs a discrete schedule"):
        Cascade([stage(8, grid={"kind": "respaced", "sections": "3"})], ENCODER)


def test_guidance_leads_away_from_the_null_text_whatever_its_length() -> None:
    model = Cascade([stage(8)], ENCODER)
    plain = generate(Cascade([stage(8, guidance={"text": 1})], ENCODER), [0, 1])[8]
    away_from = {index: generate(model, [0, 1], null_text=caption(index))[8] for index in (0, 5)}
    torch.testing.assert_close(
        away_from[0][0], plain[0], rtol=0, atol=1e-8
    )  # its own caption: nothing to lead away from
    assert float((away_from[0][1] - plain[1]).abs().max()) > 1e-3
    assert float((away_from[5] - away_from[0]).abs().max()) > 1e-3
    torch.testing.assert_close(generate(model, [1], null_text=caption(5))[8][0], away_from[5][1], rtol=0, atol=1e-8)


def test_without_captions_the_null_text_is_the_caption() -> None:
    model = Cascade([stage(8)], ENCODER)
    images = model.sample(None, [100], null_text=caption(0), dtype=torch.float64)[8]
    torch.testing.assert_close(images, generate(model, [0], null_text=caption(0))[8])


def test_null_text_is_truncated_as_captions_are() -> None:
    cut = Cascade([replace(stage(8), max_tokens=3)], ENCODER)
    long, short = (generate(cut, [0], null_text=caption(7)[:length])[8] for length in (9, 3))
    torch.testing.assert_close(long, short)


def test_stages_that_need_the_empty_caption_refuse_to_do_without() -> None:
    plain = stage(8)
    unet = plain.config.unet.model_copy(update={"dropped_caption": "empty_caption"})
    config = plain.config.model_copy(update={"unet": unet})
    model = Cascade([CascadeStage(random_weights(Denoiser(config).double()).eval(), plain.sampling)], ENCODER)
    with pytest.raises(ValueError, match='null_text: the stages need the encoding of ""'):
        generate(model, [0])
    assert generate(model, [0], null_text=caption(3))[8].shape == (1, 3, 8, 8)
    conditioning = Conditioning(text=torch.zeros(1, 1, DIM).double(), text_keep=torch.zeros(1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"conditioning.text_keep: this model reads the empty caption instead"):
        model.stages[0].denoiser(torch.zeros(1, 3, 8, 8).double(), torch.ones(1), conditioning)


def test_a_null_text_of_another_width_or_for_models_without_captions_is_refused() -> None:
    with pytest.raises(
        ValueError, match=rf"null_text: the stages read \(num_tokens, {DIM}\) embeddings \(got \(2, 3\)"
    ):
        generate(Cascade([stage(8)], ENCODER), [0], null_text=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="null_text: the stages read no captions as tokens"):
        Cascade([stage(8)]).sample(None, [0], null_text=np.zeros((2, DIM)))


def test_an_encoded_image_comes_back_without_its_prompt_whatever_the_seed() -> None:
    """With guidance of weight 0 the way down is the way up, to the error of the solver."""
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5

    def errors(num_steps: int, weight: float, strength: float = 1.0, seed: int = 1) -> float:
        sampling = {"sampler": {"kind": "heun"}, "num_steps": num_steps, "guidance": {"text": weight}}
        cascade = Cascade([stage(8, **sampling, threshold={"kind": "none"})], ENCODER)
        options = {"init_image": image, "strength": strength, "encode_init": True, "dtype": torch.float64}
        return float((cascade.sample([caption(1)], [seed], **options)[8] - image).abs().mean())  # type: ignore[arg-type]

    back, changed = errors(40, 0.0), errors(40, 2.0)
    assert back < 0.003
    assert errors(40, 0.0, seed=2) == back
    assert changed > 10 * back
    assert changed > errors(40, 2.0, strength=0.4) > errors(40, 2.0, strength=0.0) == 0


def test_networks_prepared_for_the_cpu_generate_the_same_images() -> None:
    stages = [stage(8), stage(16, 8)]
    inputs = {"dtype": torch.float32, "shape": (8, 12)}
    plain = generate(Cascade(stages, ENCODER), [0, 1, 2], **inputs)
    for one in stages:
        optimize_for_cpu(one.denoiser)
    prepared = Cascade(stages, ENCODER)
    first, again = (generate(prepared, [0, 1, 2], **inputs) for _ in range(2))
    alone = generate(prepared, [1], **inputs)
    for size, images in plain.items():
        assert torch.equal(first[size], again[size])
        assert (first[size] - images).abs().max() < 1e-4
        assert (alone[size] - images[1:2]).abs().max() < 1e-4
    assert plain[16].shape == (3, 3, 16, 24)
