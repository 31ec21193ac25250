"""The engine's requests to an object store, per shard, counted in memory."""

from benchmarks.scale_requests import requests_a_shard

GROUPS = 5  # the intermediate one included


def test_a_shard_of_precompute_takes_two_writes_per_group_and_two_reads_and_a_restart_takes_none() -> None:
    run, again, driver = requests_a_shard()
    by_time = 0.5  # the lease and the events, which are written every few seconds
    assert 2 * GROUPS <= run["PUT"] <= 2 * GROUPS + by_time  # its file, then its record
    assert 2 <= run["GET"] <= 2 + by_time  # the originals, to make images; the samples, to encode their captions
    assert run["HEAD"] == run["LIST"] == 0
    assert run["DELETE"] <= 0.1  # the originals of many shards together
    assert driver <= by_time
    assert sum(again.values()) <= by_time
