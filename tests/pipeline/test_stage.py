"""A shard carries its rows through the driver in little memory, and gives them back unchanged."""

import json
import pickle
import random

import pytest

from pipeline.errors import StaleOutputError
from pipeline.fingerprint import digest
from pipeline.stage import Shard

ROWS = [
    [
        f"{i:09d}",
        f"https://example.com/{random.Random(i).randbytes(8).hex()}.jpg",
        [f"a red fox in the snow, {i}"],
        False,
    ]
    for i in range(1000)
]


def test_rows_come_back_as_they_were() -> None:
    for rows in (ROWS, None, [["k", "caf\u00e9 \udcff", None, 1.5, {"a": [1, 2]}]]):
        shard = pickle.loads(pickle.dumps(Shard(7, rows, 1)))
        assert shard.rows == rows
        assert (shard.index, shard.name, shard.num_rows, shard.digest) == (7, "00007", 1, digest(rows))


def test_a_shard_takes_a_fraction_of_its_rows() -> None:
    shard = Shard(0, ROWS, len(ROWS))
    assert len(pickle.dumps(shard)) < 0.4 * len(pickle.dumps(ROWS))


def test_cells_of_further_columns_travel_with_the_rows_and_have_digests_of_their_own() -> None:
    plain, shard = Shard(7, ROWS, len(ROWS)), Shard(7, ROWS, len(ROWS))
    cells = {"short": [["a", "\u00e9"], None], "tags": [[], ["b"]]}
    texts = {name: json.dumps(value, separators=(",", ":"), ensure_ascii=False) for name, value in cells.items()}
    shard.take_cells({name: text.encode() for name, text in texts.items()})
    assert shard.cells("short") == cells["short"]
    arrived = pickle.loads(pickle.dumps(shard))
    assert {name: arrived.cells(name) for name in cells} == cells
    assert arrived.rows == ROWS
    assert arrived.digest == plain.digest, "a further column does not make other rows"
    assert arrived.digest_of("short") == digest(cells["short"])
    assert arrived.digest_of(None) == plain.digest_of("short") == plain.digest


def test_cells_that_are_read_later_are_compared_with_their_digest() -> None:
    class Changing:
        near = True
        cells = b"[1]"

        def read(self) -> tuple[bytes, dict[str, bytes]]:
            return b"[0]", {"short": self.cells}

    found = Changing()
    shard = Shard.of_range(0, found, digest([0]), 1, None, {"short": digest([1])})
    assert (shard.rows, shard.cells("short")) == ([0], [1])
    found.cells = b"[2]"
    with pytest.raises(StaleOutputError, match="the rows of shard 00000 are no longer what they were"):
        shard.cells("short")
