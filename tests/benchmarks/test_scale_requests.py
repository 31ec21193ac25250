"""The engine's requests to an object store, per shard, counted in memory."""

from benchmarks.scale_requests import requests_a_shard

GROUPS = 5  # the intermediate one included


def test_a_shard_of_precompute_takes_two_writes_per_group_and_two_reads_and_a_restart_takes_none() -> None:
    run, again, driver = requests_a_shard()
    assert run["PUT"] == 2 * GROUPS  # its file, then its record
    assert run["GET"] == 2  # the originals, to make images; the samples, to encode their captions
    assert run["HEAD"] == run["LIST"] == 0
    assert run["DELETE"] <= 0.1  # the originals of many shards together
    assert driver <= 0.1
    assert set(again.values()) == {0.0}
