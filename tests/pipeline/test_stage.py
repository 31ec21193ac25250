"""A shard carries its rows through the driver in little memory, and gives them back unchanged."""

import pickle
import random

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
