"""Stores that cannot be mixed are refused by name, with what differs."""

from collections.abc import Callable
from typing import Any

import pytest

from imagen_core.store import Mixture, Store
from tests.imagen_core.store.handmade_store import Made

Make = Callable[..., Made]


def pair(make: Make, **second: Any) -> dict[str, Store]:
    settings = {"sizes": (4,), "shard_rows": (6,)}
    return {"a": Store.open(make("a", **settings).path), "b": Store.open(make("b", **settings | second).path)}


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        (
            {"fingerprint": {"model": "other"}},
            {"text": "t5"},
            'store b: its text-t5 is not made as that of store a: fingerprint.model: "tiny" -> "other"; mix stores',
        ),
        ({"dtype": "int8"}, {"text": "t5"}, 'text-t5 .*: dtype: "float16" -> "int8"'),
        ({"sizes": (8,)}, {"images": [4]}, r"store b: images of 4 px are not in the store; it has \[8\]"),
        ({}, {"text": "clip"}, "store a: encoder 'clip' is not in the store"),
        ({}, {"samples": range(3)}, "samples is for one store"),
        ({}, {"batch_size": 0}, "batch_size must be 1 or more"),
    ],
)
def test_stores_that_are_not_made_alike_are_refused_by_name(
    make: Make, second: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    mixture = Mixture(pair(make, **second), {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=message):
        mixture.loader(**{"batch_size": 2, **options})


def test_what_is_not_read_may_differ(make: Make) -> None:
    stores = pair(make, fingerprint={"model": "other"}, store_format="hdf5", codec="png")
    batch = next(iter(Mixture(stores, {"a": 1, "b": 1}).loader(4, images=[4])))
    assert batch["images"][4].shape == (4, 3, 4, 4)


@pytest.mark.parametrize(
    ("weights", "samples", "message"),
    [
        ({"a": 1, "c": 1}, {}, r"must name the stores a, b \(got a, c"),
        ({"a": 1, "b": 1}, {"c": range(2)}, "must name the stores a, b"),
        ({"a": 0, "b": 0}, {}, "not all be 0"),
        ({"a": 1, "b": -1}, {}, "got -1"),
    ],
)
def test_weights_and_samples_that_do_not_fit_are_refused(
    make: Make, weights: dict[str, float], samples: dict[str, range], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(pair(make), weights, samples)


def test_a_store_without_samples_to_read_is_refused(make: Make) -> None:
    mixture = Mixture(pair(make), {"a": 1, "b": 1}, {"b": range(0)})
    with pytest.raises(ValueError, match="store b: has no samples to read"):
        mixture.loader(2)


def test_shares_are_weights_over_their_sum(make: Make) -> None:
    assert Mixture(pair(make), {"a": 3, "b": 1}).shares == {"a": 0.75, "b": 0.25}


def test_parts_of_stores_are_mixed(make: Make) -> None:
    stores = pair(make)
    mixed = Mixture(stores, {"a": 1, "b": 1}, {"a": range(1, 3), "b": range(4, 6)}).loader(4, shuffle=False)
    assert next(iter(mixed))["keys"] == ["000-001", "000-004", "000-002", "000-005"]
