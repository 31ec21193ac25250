"""Loader: right tensors, each sample once, and the same order however it is run."""

import inspect
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from imagen_core import store as st
from imagen_core.store.read.options import LoaderOptions
from tests.imagen_core.store.handmade_store import DIM, Made

Make = Callable[..., Made]
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.float16,
}


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def run_global(store: st.Store, world_size: int, batch_size: int = 2, **options: Any) -> list[list[str]]:
    """Keys of each global batch of one epoch, ranks joined."""
    loaders = [
        store.loader(batch_size=batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    return [[key for batch in batches for key in batch["keys"]] for batches in zip(*loaders, strict=True)]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_batches_hold_the_samples_values(make: Make, store_format: st.StoreFormat, dtype: st.StoreDtype) -> None:
    made = make(store_format=store_format, dtype=dtype, num_captions=1)
    store = st.Store.open(made.path)
    seen = 0
    for batch in store.loader(batch_size=5, images=[8, 4], text="t5"):
        size = len(batch["keys"])
        assert batch["images"][8].shape == (size, 3, 8, 8)
        assert batch["images"][8].dtype == torch.uint8
        assert batch["text"].dtype == DTYPES[dtype]
        assert batch["text_mask"].dtype == torch.bool
        longest = 0
        for k, key in enumerate(batch["keys"]):
            sample = store[made.keys.index(key)]
            for px in (8, 4):
                np.testing.assert_array_equal(batch["images"][px][k].permute(1, 2, 0).numpy(), sample.images[px])
            x = torch.from_numpy(sample.text["t5"][0]).to(DTYPES[dtype])
            assert torch.equal(batch["text"][k, : len(x)], x)
            assert not batch["text"][k, len(x) :].any()
            assert batch["text_mask"][k].tolist() == [i < len(x) for i in range(batch["text"].shape[1])]
            longest, seen = max(longest, len(x)), seen + 1
        assert batch["text"].shape == (size, longest, DIM)
    assert seen == 12


def test_long_embeddings_are_truncated(make: Make) -> None:
    made = make(num_captions=1)
    store = st.Store.open(made.path)
    (batch,) = store.loader(batch_size=12, text="t5", max_tokens=2, shuffle=False)
    lengths = [min(2, len(x[0])) for x in made.text]
    assert batch["text"].shape == (12, 2, DIM)
    assert batch["text_mask"].sum(1).tolist() == lengths
    assert torch.equal(batch["text"][2, :2], torch.from_numpy(store[2].text["t5"][0][:2]))


def test_only_requested_fields_are_loaded(make: Make) -> None:
    store = st.Store.open(make().path)
    assert set(next(iter(store.loader(batch_size=2)))) == {"keys"}
    assert set(next(iter(store.loader(batch_size=2, images=[4])))) == {"keys", "images"}
    assert set(next(iter(store.loader(batch_size=2, text="t5")))) == {"keys", "text", "text_mask"}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [11, 12, 13, 7])
def test_each_sample_is_seen_once_an_epoch(make: Make, world_size: int, num_rows: int) -> None:
    made = make(shard_rows=(num_rows - 3, 3), sizes=(4,))
    store = st.Store.open(made.path)
    batches = run_global(store, world_size, images=[4], text="t5")
    assert sorted(key for batch in batches for key in batch) == sorted(made.keys)
    assert len(batches) == len(store.loader(batch_size=2, world_size=world_size)) == -(-num_rows // (2 * world_size))


def test_a_small_last_batch_is_split_evenly(make: Make) -> None:
    store = st.Store.open(make(shard_rows=(7,)).path)
    sizes = [[len(b["keys"]) for b in store.loader(batch_size=2, rank=r, world_size=3, text="t5")] for r in range(3)]
    assert sorted(map(tuple, sizes)) == [(2, 0), (2, 0), (2, 1)]


def test_an_empty_batch_has_empty_tensors(make: Make) -> None:
    store = st.Store.open(make(shard_rows=(1,)).path)
    (batch,) = store.loader(batch_size=2, rank=0, world_size=2, images=[8], text="t5")
    assert batch["keys"] == []
    assert batch["images"][8].shape == (0, 3, 8, 8)
    assert batch["text"].shape == (0, 0, DIM)
    assert batch["text_mask"].shape == (0, 0)


def test_drop_last_leaves_out_the_small_batch(make: Make) -> None:
    store = st.Store.open(make(shard_rows=(7,)).path)
    full = run_global(store, 3)
    assert run_global(store, 3, drop_last=True) == full[:1]
    loader = store.loader(batch_size=3, drop_last=True)
    assert [len(keys_of(loader)) for _ in range(3)] == [6, 6, 6]
    assert list(store.loader(batch_size=8, drop_last=True)) == []


def test_global_batches_do_not_depend_on_the_world_size(make: Make) -> None:
    store = st.Store.open(make().path)
    one, two, four = (run_global(store, w, 4 // w) for w in (1, 2, 4))
    assert one == two == four
    assert [len(batch) for batch in one] == [4, 4, 4]


def test_each_epoch_has_its_order_and_a_seed_repeats_them(make: Make) -> None:
    made = make()
    store = st.Store.open(made.path)
    loader, again, other = (store.loader(batch_size=5, seed=seed) for seed in (3, 3, 4))
    epochs = [keys_of(loader) for _ in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == sorted(made.keys) for epoch in epochs)
    assert [keys_of(again) for _ in range(4)] == epochs
    assert keys_of(other) != epochs[0]


def test_without_shuffle_the_order_is_the_stores(make: Make) -> None:
    made = make()
    loader = st.Store.open(made.path).loader(batch_size=5, shuffle=False)
    assert keys_of(loader) == keys_of(loader) == made.keys


def captions_chosen(store: st.Store, epochs: int = 1, **options: Any) -> dict[tuple[int, str], bytes]:
    chosen = {}
    loader = store.loader(text="t5", **options)
    for epoch in range(epochs):
        for batch in loader:
            for k, key in enumerate(batch["keys"]):
                chosen[epoch, key] = batch["text"][k][batch["text_mask"][k]].numpy().tobytes()
    return chosen


def test_the_caption_taken_does_not_depend_on_how_it_is_run(make: Make) -> None:
    made = make(num_captions=4)
    store = st.Store.open(made.path)
    chosen = captions_chosen(store, batch_size=1)
    assert captions_chosen(store, batch_size=7) == chosen
    assert captions_chosen(store, batch_size=7, shuffle=False) == chosen
    halves = [captions_chosen(store, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    assert halves[0] | halves[1] == chosen
    for (_, key), value in chosen.items():
        options = [x.astype(np.float16).tobytes() for x in made.text[made.keys.index(key)]]
        assert value in options


def test_captions_are_those_of_the_embeddings(make: Make) -> None:
    made = make(num_captions=4, dtype="float32")
    store = st.Store.open(made.path)
    samples = {sample.key: sample for sample in store}
    for batch in store.loader(5, text="t5", captions=True, seed=3):
        for key, caption, text, mask in zip(
            batch["keys"], batch["captions"], batch["text"], batch["text_mask"], strict=True
        ):
            number = samples[key].captions.index(caption)
            assert torch.equal(text[mask], torch.from_numpy(samples[key].text["t5"][number]))


def test_all_captions_are_taken_over_the_epochs(make: Make) -> None:
    made = make(num_captions=3)
    chosen = captions_chosen(st.Store.open(made.path), epochs=40, batch_size=12)
    for key, texts in zip(made.keys, made.text, strict=True):
        taken = [chosen[epoch, key] for epoch in range(40)]
        counts = [taken.count(x.astype(np.float16).tobytes()) for x in texts]
        assert sum(counts) == 40
        assert min(counts) >= 3


def test_resume_with_other_world_sizes_sees_each_sample_once(make: Make) -> None:
    made = make(shard_rows=(20, 17), sizes=(4,))
    store = st.Store.open(made.path)
    straight = keys_of(store.loader(batch_size=1, seed=9))
    seen: list[str] = []
    state = None
    for world_size, batch_size, steps in ((2, 3, 2), (1, 5, 2), (2, 2, 99)):
        loaders = [
            store.loader(batch_size=batch_size, rank=rank, world_size=world_size, seed=9, text="t5")
            for rank in range(world_size)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _, batches in zip(range(steps), zip(*loaders, strict=True), strict=False):
            seen += keys_of(batches)
            state = loaders[0].state_dict()
            assert [loader.state_dict() for loader in loaders] == [state] * world_size
    assert seen == straight
    assert state is not None
    assert (state["epoch"], state["position"]) == (1, 0)


def test_a_resumed_run_is_the_uninterrupted_one(make: Make) -> None:
    store = st.Store.open(make(num_captions=3).path)
    options: dict[str, Any] = {"batch_size": 5, "images": [8], "text": "t5", "seed": 1}
    straight = store.loader(**options)
    expected = [batch for _ in range(3) for batch in straight]
    got = []
    state = store.loader(**options).state_dict()
    for _ in expected:
        loader = store.loader(**options)
        loader.load_state_dict(state)
        got.append(next(iter(loader)))
        state = loader.state_dict()
    for a, b in zip(got, expected, strict=True):
        assert a["keys"] == b["keys"]
        assert torch.equal(a["images"][8], b["images"][8])
        assert torch.equal(a["text"], b["text"])


def test_a_loop_left_early_continues_there(make: Make) -> None:
    made = make()
    loader = st.Store.open(made.path).loader(batch_size=5)
    first = next(iter(loader))["keys"]
    assert sorted(first + keys_of(loader)) == sorted(made.keys)
    assert len(keys_of(loader)) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed 5, this loader has 0"),
        ({"shuffle": False}, "shuffle False"),
        ({"shuffle_window_shards": 2}, "shuffle_window_shards 2, this loader has 0"),
        ({"replacement": True}, "replacement True, this loader has 0"),
    ],
)
def test_resume_with_another_order_is_refused(make: Make, change: dict[str, Any], message: str) -> None:
    store = st.Store.open(make().path)
    state = store.loader(batch_size=2, **change).state_dict()
    with pytest.raises(ValueError, match=message):
        store.loader(batch_size=2).load_state_dict(state)


def test_resume_with_another_store_is_refused(make: Make) -> None:
    state = st.Store.open(make("a", shard_rows=(4,)).path).loader(batch_size=2).state_dict()
    with pytest.raises(ValueError, match="num_samples 4, this loader has 12"):
        st.Store.open(make("b").path).loader(batch_size=2).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_part_of_the_store_is_an_epoch_of_its_own(make: Make, shuffle: bool) -> None:
    made = make(num_captions=3)
    store = st.Store.open(made.path)
    part = store.loader(batch_size=2, shuffle=shuffle, samples=range(3, 10))
    epochs = [keys_of(part) for _ in range(3)]
    assert all(sorted(epoch) == sorted(made.keys[3:10]) for epoch in epochs)
    assert len(part) == 4
    assert (epochs[0] == made.keys[3:10]) is not shuffle
    full = captions_chosen(store, batch_size=5)
    chosen = captions_chosen(store, batch_size=5, samples=range(3, 10))
    assert chosen == {name: value for name, value in full.items() if name[1] in made.keys[3:10]}


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("samples", [range(28), range(4, 23)])
def test_a_windowed_epoch_reads_few_shards_at_a_time_and_each_sample_once(
    make: Make, window: int, samples: range
) -> None:
    made = make(shard_rows=(7, 5, 6, 3, 9), excluded={2: [0], 4: [8]}, sizes=(4,), num_captions=1)
    keys = [made.keys[i] for i in samples]
    sizes = Counter(key[:3] for key in keys)
    loader = st.Store.open(made.path).loader(1, samples=samples, shuffle_window_shards=window, seed=2)
    epochs = [keys_of(loader) for _ in range(6)]
    orders = set()
    for epoch in epochs:
        assert sorted(epoch) == sorted(keys)
        shards = list(dict.fromkeys(key[:3] for key in epoch))
        orders.add(tuple(shards))
        for first in range(0, len(shards), window):
            opened = shards[first : first + window]
            count = sum(sizes[shard] for shard in opened)
            assert {key[:3] for key in epoch[:count]} == set(opened)
            assert epoch[:count] != sorted(epoch[:count]) or count < 8
            epoch = epoch[count:]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len(orders) > 1


def test_a_windowed_order_is_the_same_for_all_world_sizes_and_resumes(make: Make) -> None:
    store = st.Store.open(make(shard_rows=(7, 5, 6, 3, 9), sizes=(4,)).path)
    options: dict[str, Any] = {"shuffle_window_shards": 2, "seed": 5}
    one, two, four = (run_global(store, w, 4 // w, **options) for w in (1, 2, 4))
    assert one == two == four
    assert one != run_global(store, 1, 4, seed=5)
    started = store.loader(4, **options)
    straight = [key for batch in one for key in batch]
    seen = keys_of(islice(started, 3))
    loaders = [store.loader(3, rank=rank, world_size=2, **options) for rank in range(2)]
    for loader in loaders:
        loader.load_state_dict(json.loads(json.dumps(started.state_dict())))
    rest = [key for batches in zip(*loaders, strict=True) for key in keys_of(batches)]
    assert seen + rest == straight


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (range(10), "first_sample 1, this loader has 0"),
        (range(2, 12), "first_sample 1, this loader has 2"),
        (None, "num_samples 10, this loader has 12"),
    ],
)
def test_resume_with_another_part_of_the_store_is_refused(make: Make, samples: range | None, message: str) -> None:
    store = st.Store.open(make().path)
    state = store.loader(batch_size=2, samples=range(1, 11)).state_dict()
    with pytest.raises(ValueError, match=message):
        store.loader(batch_size=2, samples=samples).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": range(0, 12, 2)}, r"samples must be a range of step 1 within 12 samples"),
        ({"samples": range(3, 13)}, r"samples must be a range of step 1 within 12 samples"),
        ({"images": [5]}, r"images of 5 px are not in the store; it has \[4, 8\]"),
        ({"text": "clip"}, "encoder 'clip' is not in the store"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"shuffle_window_shards": 0}, "shuffle_window_shards must be 1 or more"),
        ({"shuffle_window_shards": 2, "shuffle": False}, "goes with shuffle"),
    ],
)
def test_wrong_arguments_are_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.Store.open(make().path).loader(**{"batch_size": 2, **options})


def test_pinned_memory_without_a_cuda_device_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="pin_memory is for copies to a CUDA device"):
        st.Store.open(make().path).loader(2, pin_memory=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_have_the_same_values(make: Make) -> None:
    store = st.Store.open(make(dtype="bfloat16").path)
    loaders = (store.loader(5, [8, 4], "t5", pin_memory=pin) for pin in (False, True))
    for a, b in zip(*loaders, strict=True):
        for x, y in ((a["text"], b["text"]), (a["text_mask"], b["text_mask"]), (a["images"][8], b["images"][8])):
            assert torch.equal(x, y)
            assert y.is_pinned()


def test_a_batch_that_is_kept_never_changes(make: Make) -> None:
    store = st.Store.open(make().path)
    loader = store.loader(5, [8], "t5")
    kept = [batch for _ in range(4) for batch in loader]
    copies = [{name: batch[name].clone() for name in ("text", "text_mask")} for batch in kept]
    list(loader)
    pointers = {batch["images"][8].data_ptr() for batch in kept} | {batch["text"].data_ptr() for batch in kept}
    assert len(pointers) == 2 * len(kept)
    assert all(torch.equal(batch[name], copy[name]) for batch, copy in zip(kept, copies, strict=True) for name in copy)


def test_the_arguments_of_store_loader_are_the_fields_of_its_options() -> None:
    parameters = list(inspect.signature(st.Store.loader).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters if p.default is not p.empty] == [
        (field.name, field.default) for field in fields(LoaderOptions) if field.name != "batch_size"
    ]
    assert parameters[0].name == "batch_size"


def test_an_unknown_loader_option_is_named(make: Make) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'imags'"):
        st.Store.open(make().path).loader(batch_size=2, imags=[4])


def test_torchs_dataloader_is_refused_with_the_line_to_write_instead(make: Make) -> None:
    loader = st.Store.open(make().path).loader(batch_size=2)
    with pytest.raises(TypeError, match=r"yields whole batches itself .* `for batch in store\.loader"):
        next(iter(torch.utils.data.DataLoader(loader, num_workers=0)))  # pyright: ignore[reportArgumentType]
