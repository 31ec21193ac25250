"""Batches and what a step makes of them: exact pixels, aligned crops, dropped captions, and places to resume from."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.diffusion import Denoiser, diffusion_loss
from imagen_core.store import Store
from imagen_core.train import TrainConfig, TrainError
from imagen_core.train.data.example import Example, make_example
from imagen_core.train.data.randomness import SampleColumn, sample_numbers
from imagen_core.train.data.store import open_store
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import Batch, BatchStream
from imagen_core.train.parallel.world import World
from tests.imagen_core.store.handmade_store import remove
from tests.imagen_core.train.small import BASE, BASE_UNET, SUPER, changed, make_config, make_store

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def read(config: TrainConfig, count: int, world: World = ALONE, state: dict[str, Any] | None = None) -> list[Batch]:
    stream = BatchStream(open_stores(config), config, world, state)
    batches = [stream.next() for _ in range(count)]
    stream.close()
    return batches


def example(config: TrainConfig, batch: Batch, step: int = 0) -> Example:
    return make_example(batch, config, Denoiser(config.denoiser), CPU, step)


def test_batches_go_on_over_epochs_and_count_samples(store: Path) -> None:
    config = make_config(store, batch_size=12)
    batches = read(config, 8)  # epochs of 12 + 12 + 12 + 4
    assert [len(batch.keys) for batch in batches] == [12, 12, 12, 4] * 2
    assert [batch.counters.start for batch in batches] == [0, 12, 24, 36, 40, 52, 64, 76]
    for epoch in (batches[:4], batches[4:]):
        assert len({key for batch in epoch for key in batch.keys}) == 40


def test_a_far_store_is_read_through_the_cache_a_few_shards_at_a_time(store: Path, tmp_path: Path) -> None:
    config = make_config(store, batch_size=4, data={"cache_dir": str(tmp_path / "cache"), "shuffle_window_shards": 1})
    batches = read(config, 10)
    shards = ["".join(sorted({key[0] for key in batch.keys})) for batch in batches]
    assert shards in (["0"] * 6 + ["1"] * 4, ["1"] * 4 + ["0"] * 6)
    assert len({key for batch in batches for key in batch.keys}) == 40
    copies = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert len(copies) == 2 * 3  # of two shards: samples, images of one size, embeddings
    resumed = read(config, 4, state=batches[5].loader_state)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in batches[6:]]


def test_where_chooses_samples_before_ranges_and_validation_count_them(store: Path) -> None:
    pytest.importorskip("sqlglot")
    condition = "NOT key LIKE '%0'"  # 5 of 40 are left out
    config = make_config(store, where=condition, batch_size=6, validation={"num_samples": 6})
    batches = read(config, 10)
    assert [len(batch.keys) for batch in batches] == [6, 6, 6, 6, 5] * 2
    every = [sample.key for sample in Store.open(store) if not sample.key.endswith("0")]
    assert {key for batch in batches[:5] for key in batch.keys} == set(every[:29])
    resumed = read(config, 4, state=batches[5].loader_state)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in batches[6:]]
    for other in ("NOT key LIKE '%1'", None):
        with pytest.raises(TrainError, match="place in the data does not fit: loader state is of another condition"):
            read(
                make_config(store, where=other, batch_size=6, validation={"num_samples": 4}),
                1,
                state=batches[5].loader_state,
            )
    with pytest.raises(TrainError, match=r"where: .* has no column 'score'"):
        open_store(make_config(store, where="score > 1"))
    with pytest.raises(TrainError, match="has 0 samples for which where="):
        open_store(make_config(store, where="width > 100"))


def test_a_part_of_the_store_is_trained_on(store: Path) -> None:
    everything = {key for batch in read(make_config(store), 5) for key in batch.keys}
    parts = []
    for part in ((0, 10), (10, 40)):
        parts.append({key for batch in read(make_config(store, data={"samples": part}), 6) for key in batch.keys})
    assert [len(part) for part in parts] == [10, 30]
    assert parts[0] | parts[1] == everything
    first = read(make_config(store, data={"samples": (0, 10)}), 1)[0]
    with pytest.raises(TrainError, match=r"the checkpoint's place in the data does not fit: .*samples must stay"):
        read(make_config(store, data={"samples": (10, 40)}), 1, state=first.loader_state)


def test_validation_samples_are_never_in_a_batch(store: Path) -> None:
    config = make_config(store, validation={"num_samples": 10})
    keys = {key for batch in read(config, 12) for key in batch.keys}
    held_out = {sample.key for sample in Store.open(store)[-10:]}
    assert len(keys) == 30
    assert not keys & held_out


def test_the_state_of_a_batch_ignores_what_was_read_ahead(store: Path) -> None:
    config = make_config(store, batch_size=6)
    batches = read(config, 10)
    for consumed in (1, 4, 7):
        state = batches[consumed - 1].loader_state
        assert [batch.keys for batch in read(config, 3, state=state)] == [
            batch.keys for batch in batches[consumed : consumed + 3]
        ]


def test_processes_share_a_batch_and_its_numbers(store: Path) -> None:
    config = make_config(store, batch_size=6)
    full = read(config, 8)
    parts = [read(config, 8, World(rank, 3, CPU)) for rank in range(3)]
    for step, batch in enumerate(full):
        assert [key for part in parts for key in part[step].keys] == batch.keys
        assert [n for part in parts for n in part[step].counters] == list(batch.counters)
        assert {part[step].global_size for part in parts} == {len(batch.keys)}


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_training_continues_after_a_removal_with_the_batches_it_would_have_had(
    tmp_path: Path, world_size: int
) -> None:
    config = make_config(make_store(tmp_path / "store"), batch_size=3, validation={"num_samples": 10})
    before = read(config, 20)
    gone = {*before[2].keys, before[4].keys[1], before[15].keys[0]}
    remove(tmp_path / "store", key=sorted(gone))
    left = [[key for key in batch.keys if key not in gone] for batch in before]
    expected = [(keys, batch) for keys, batch in zip(left, before, strict=True) if keys][1:]
    parts = [
        read(config, len(expected), World(rank, world_size, CPU), state=before[0].loader_state)
        for rank in range(world_size)
    ]
    for step, (keys, batch) in enumerate(expected):
        assert [key for part in parts for key in part[step].keys] == keys
        assert {part[step].global_size for part in parts} == {len(keys)}
        assert {part[step].loader_state["position"] for part in parts} == {batch.loader_state["position"]}
        assert all(len(part[step].keys) <= part[step].largest_part == 3 // world_size for part in parts)
        numbers = [n for part in parts for n in part[step].counters]
        assert len(numbers) == len(set(numbers) & set(batch.counters)), "no random number is taken twice"
    fresh = read(config, 9)
    assert {key for batch in fresh for key in batch.keys}.isdisjoint(gone)
    assert [len(batch.keys) for batch in fresh] == [3] * 8 + [1], "30 samples less the 5 that were trained on"


def test_an_error_of_the_reading_thread_comes_as_an_empty_last_batch(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store")
    config = make_config(path)
    opened = open_stores(config)
    next((path / "images-16").iterdir()).unlink()
    stream = BatchStream(opened, config, ALONE, None)
    batches = [stream.next() for _ in range(20)]
    stream.close()
    assert [batch.error is None for batch in batches] == sorted((b.error is None for b in batches), reverse=True)
    assert "missing" in str(batches[-1].error)
    assert (batches[-1].keys, batches[-1].global_size, batches[-1].largest_part) == ([], 8, 8)


def test_closing_ends_the_thread(store: Path) -> None:
    before = threading.active_count()
    stream = BatchStream(open_stores(make_config(store)), make_config(store), ALONE, None)
    stream.next()
    stream.close()
    assert threading.active_count() == before


def test_pixels_are_scaled_exactly(store: Path) -> None:
    config = make_config(store, compute={"channels_last": True})
    (batch,) = read(config, 1)
    x0 = example(config, batch).x0
    assert x0.is_contiguous(memory_format=torch.channels_last)
    expected = batch.images[16].double() / 127.5 - 1
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-15)
    assert float(x0.min()) >= -1
    assert float(x0.max()) <= 1


def test_captions_are_dropped_at_the_stated_rate(store: Path) -> None:
    config = make_config(store, batch_size=40, conditioning_dropout={"text": 0.25})
    keeps = [example(config, batch).conditioning.text_keep for batch in read(config, 25)]
    kept = torch.cat([keep for keep in keeps if keep is not None])
    assert len(kept) == 1000
    assert abs(float(kept.double().mean()) - 0.75) < 0.04
    none = make_config(store, conditioning_dropout={"text": 0.0})
    assert bool(example(none, read(none, 1)[0]).conditioning.text_keep.all())  # type: ignore[union-attr]


def test_half_of_the_images_are_flipped_with_their_low_resolution(store: Path) -> None:
    denoiser = SUPER | {"low_res_noise": None, "unet": SUPER["unet"] | {"low_res_noise": False}}
    plain, flipped = (make_config(store, denoiser=denoiser, views={"horizontal_flip": flip}) for flip in (False, True))
    same = num_flipped = 0
    for batch, turned in zip(read(plain, 5), read(flipped, 5), strict=True):
        a, b = example(plain, batch), example(flipped, turned)
        assert a.conditioning.low_res is not None
        assert b.conditioning.low_res is not None
        for k in range(len(batch.keys)):
            if torch.equal(a.x0[k], b.x0[k]):
                same += 1
                assert torch.equal(a.conditioning.low_res[k], b.conditioning.low_res[k])
            else:
                num_flipped += 1
                assert torch.equal(a.x0[k].flip(-1), b.x0[k])
                torch.testing.assert_close(a.conditioning.low_res[k].flip(-1), b.conditioning.low_res[k])
    assert 10 <= num_flipped <= 30
    assert same + num_flipped == 40


def test_crops_of_both_sizes_show_the_same_place(store: Path) -> None:
    unet = SUPER["unet"] | {"low_res_noise": False}
    full = make_config(store, denoiser=SUPER | {"low_res_noise": None, "unet": unet})
    config = changed(full, views={"crop_px": 16})
    corners = set()
    for batch, cropped in zip(read(full, 5), read(config, 5), strict=True):
        cut = example(config, cropped)
        assert cropped.keys == batch.keys
        assert cut.x0.shape[-2:] == (16, 16)
        for k in range(len(batch.keys)):
            large = batch.images[32][k].double() / 127.5 - 1
            places = [
                (top, left)
                for top in range(17)
                for left in range(17)
                if torch.allclose(large[:, top : top + 16, left : left + 16], cut.x0[k])
            ]
            ((top, left),) = places
            assert top % 2 == left % 2 == 0
            corners.add((top // 2, left // 2))
            small = (batch.images[16][k].double() / 127.5 - 1)[:, top // 2 :, left // 2 :][None, :, :8, :8]
            low_res = torch.nn.functional.interpolate(small, size=(16, 16), mode="bicubic").clamp(-1, 1)
            assert cut.conditioning.low_res is not None
            torch.testing.assert_close(cut.conditioning.low_res[k], low_res[0])
    tops, lefts = ({corner[axis] for corner in corners} for axis in (0, 1))
    assert {0, 8} <= tops <= set(range(9))  # the edges are reached
    assert {0, 8} <= lefts <= set(range(9))


def test_crops_are_read_from_the_store_at_the_places_of_full_images(store: Path) -> None:
    """Computed again on full images: a run that started before crops were read from the store continues unchanged."""
    full = make_config(store, denoiser=SUPER, batch_size=6, seed=11)
    config = changed(full, views={"crop_px": 8})
    batches = read(full, 9)  # over the end of the epoch, with a short batch
    for world_size in (1, 3):
        ranks = [read(config, 9, World(rank, world_size, CPU)) for rank in range(world_size)]
        for step, batch in enumerate(batches):
            place = sample_numbers(11, batch.counters, (3, 8, 8), low_res=False, device=CPU).uniform[
                :, [SampleColumn.CROP_TOP, SampleColumn.CROP_LEFT]
            ]
            corners = (place * (16 - 4 + 1)).long().tolist()
            for px, ratio in ((32, 2), (16, 1)):
                expected = [
                    image[:, ratio * top : ratio * (top + 4), ratio * left : ratio * (left + 4)]
                    for image, (top, left) in zip(batch.images[px], corners, strict=True)
                ]
                got = torch.cat([rank[step].images[px] for rank in ranks])
                assert torch.equal(got, torch.stack(expected))
    resumed = read(config, 2, state=batches[5].loader_state)
    straight = read(config, 8)[6:]
    for a, b in zip(resumed, straight, strict=True):
        assert torch.equal(a.images[32], b.images[32])


@pytest.mark.parametrize(("per", "num_levels"), [("batch", 1), ("sample", 8)])
def test_low_resolution_noise_is_per_batch_or_per_sample(store: Path, per: str, num_levels: int) -> None:
    config = make_config(store, denoiser=SUPER | {"low_res_noise": {"kind": "lognormal", "per": per}})
    first, second = read(config, 2)
    levels = [example(config, batch, step).conditioning.low_res_noise for step, batch in enumerate((first, second))]
    assert levels[0] is not None
    assert levels[1] is not None
    assert len(levels[0].unique()) == num_levels
    assert not torch.isin(levels[0], levels[1]).any()
    part = example(config, first.part(3, 5), 0).conditioning.low_res_noise
    assert part is not None
    torch.testing.assert_close(part, levels[0][3:5], rtol=0, atol=0)


def test_an_example_does_not_depend_on_its_batch(store: Path) -> None:
    config = make_config(store, denoiser=SUPER, views={"crop_px": 16, "horizontal_flip": True})
    (batch,) = read(config, 1)
    full, part = example(config, batch), example(config, batch.part(5, 7))
    for name in ("x0", "sigma", "noise"):
        assert torch.equal(getattr(part, name), getattr(full, name)[5:7])
    for name in ("text", "text_mask", "text_keep", "low_res", "low_res_noise"):
        assert torch.equal(getattr(part.conditioning, name), getattr(full.conditioning, name)[5:7])


def test_an_empty_part_becomes_one_row_that_the_model_can_take(store: Path) -> None:
    config = make_config(store, denoiser=SUPER, views={"crop_px": 16})
    (batch,) = read(config, 1)
    empty = example(config, batch.part(8, 12))
    denoiser = Denoiser(config.denoiser).double()
    result = denoiser(empty.x0, empty.sigma, empty.conditioning)
    assert result.shape == (1, 3, 16, 16)
    assert bool(result.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": BASE | {"size_px": 64}}, r"no images-64 \(sizes: \[16, 32\]\)"),
        ({"text": "clip"}, r"no encoder 'clip' \(encoders: \['t5'\]\)"),
        ({"denoiser": BASE | {"unet": BASE_UNET | {"text_dim": 9}}}, "text_dim is 9, .* of 't5' .* 8 wide"),
        ({"validation": {"num_samples": 40}}, r"validation\.num_samples is 40, but the store has 40 samples"),
        (
            {"data": {"samples": (8, 41)}},
            r"data\.samples: \[8, 41\] is no part of the 40 samples that are not for validation",
        ),
        (
            {"data": {"samples": (8, 38)}, "validation": {"num_samples": 4}},
            r"data\.samples: \[8, 38\] is no part of the 36 samples",
        ),
        ({"data": {"samples": (5, 5)}}, r"data\.samples: \[5, 5\] is no part"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(store: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        open_stores(make_config(store, **changes))


def test_a_batch_that_processes_cannot_share_is_refused(store: Path) -> None:
    config = make_config(store, batch_size=8)
    with pytest.raises(TrainError, match="batch_size 8 must be a multiple of the 3 processes"):
        BatchStream(open_stores(config), config, World(0, 3, CPU), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "text is None, but denoiser.unet.text_dim is 8"),
        ({"views": {"crop_px": 16}}, r"views\.crop_px is for super-resolution"),
        ({"denoiser": SUPER, "views": {"crop_px": 15}}, r"views\.crop_px 15 must be a multiple of"),
        ({"denoiser": SUPER, "views": {"crop_px": 64}}, r"views\.crop_px 64 is larger than size_px 32"),
        ({"ema": {"rates": [1.0]}}, r"rates: each must be in \[0, 1\)"),
        ({"ema": {"rates": [0.9, 0.9]}}, "rates: each once"),
        ({"parallel": {"shard_group_size": 2}}, r"shard_group_size is for parallel\.kind=fsdp2"),
        ({"batch_sise": 4}, "batch_sise"),
        (
            {"denoiser": BASE | {"unet": BASE_UNET | {"condition_channels": 3}}},
            "condition_channels is 3, but condition_images are {}; set it to the sum",
        ),
    ],
)
def test_settings_that_contradict_are_refused(store: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(store, **changes)


@pytest.mark.slow
def test_a_compiled_network_meets_few_lengths_and_the_same_loss(store: Path) -> None:
    """One network is compiled for each length: with 128 tokens at most four, not 128."""
    config = make_config(store, batch_size=2, max_tokens=8)
    compiled = changed(config, compute={"compile": True})
    denoiser = Denoiser(config.denoiser).double()
    lengths: set[int] = set()
    for batch in read(config, 20):
        plain, padded = example(config, batch), example(compiled, batch)
        text = padded.conditioning.text
        assert text is not None
        lengths.add(text.shape[1])
        for a, b in zip(losses(denoiser, plain), losses(denoiser, padded), strict=True):
            torch.testing.assert_close(a, b)
    assert lengths <= {2, 4, 6, 8}
    assert len(lengths) > 1
    cut = changed(config, compute={"compile": True}, max_tokens=3)
    assert {example(cut, batch).conditioning.text.shape[1] for batch in read(cut, 20)} <= {1, 2, 3}  # type: ignore[union-attr]


@torch.no_grad()
def losses(denoiser: Denoiser, example: Example) -> torch.Tensor:
    return diffusion_loss(denoiser, example.x0, example.sigma, example.noise, example.conditioning)
