"""How many requests and bytes the commands take whose source and run folder are on S3 (moto's server)."""

from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.requests import GROUPS, ROWS_PER_SHARD, SETTINGS, write_tars
from tests.commands import call
from tests.object_store import ObjectStore, object_store

pytestmark = pytest.mark.slow

FEW, MANY = 8, 24
BY_TIME = (".lease.json", "/events/")
"""Objects that are read or written every few seconds, however many shards are made meanwhile."""


class Life:
    """The commands on run folders of few and of more shards: requests, and bytes of the source."""

    def __init__(self, s3: ObjectStore):
        self.s3 = s3
        self.requests: dict[tuple[str, int], Counter[str]] = {}
        self.source: dict[tuple[str, int], float] = {}
        for shards in (FEW, MANY):
            size = write_tars(s3, f"data-{shards}", shards, image_px=64, seed=shards)
            out = f"{s3.url}/run-{shards}"
            what = ("precompute", "--out", out, "source.kind=webdataset", f"source.path={s3.url}/data-{shards}")
            what += (f"shard_size={ROWS_PER_SHARD}", *SETTINGS)
            run = ("run", *what, "--executor", "inline", "--quiet")
            for name, command in (
                ("plan", ("plan", *what)),
                ("first", run),
                ("idle", run),
                ("status", ("status", out)),
            ):
                s3.requests.clear()
                result = call(*command)
                assert result.code == 0, result.err
                by_shard = (r for r in s3.requests.seen if not any(part in r.key for part in BY_TIME))
                self.requests[name, shards] = Counter(request.kind for request in by_shard)
                self.source[name, shards] = s3.requests.bytes_sent(f"data-{shards}/") / size

    def per_shard(self, name: str, kind: str = "") -> float:
        few, many = ({k: n for k, n in self.requests[name, shards].items() if kind in k} for shards in (FEW, MANY))
        return (sum(many.values()) - sum(few.values())) / (MANY - FEW)


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    with object_store() as s3:
        yield Life(s3)


def test_a_first_run_takes_at_most_12_requests_per_shard(life: Life) -> None:
    assert life.per_shard("first") <= 12.2  # 10 writes, 2 reads, and the deletion of originals for 32 shards together
    assert life.per_shard("first", "HEAD") == 0
    assert life.requests["first", MANY].total() - MANY * life.per_shard("first") < 175  # half list folders


def test_each_byte_of_the_source_comes_once_per_run(life: Life) -> None:
    assert life.source["first", MANY] <= 1.05
    assert life.source["idle", MANY] <= 1.05


def test_a_plan_reads_headers_and_captions(life: Life) -> None:
    assert life.source["plan", MANY] <= 0.5  # of images of 12 kB; a header and a caption take 2 kB


def test_a_restart_with_nothing_to_do_takes_at_most_a_tenth_of_a_request_per_record(life: Life) -> None:
    assert life.per_shard("idle") <= 0.1 * len(GROUPS)


def test_the_status_takes_no_request_per_shard(life: Life) -> None:
    assert life.per_shard("status") == 0
    assert life.requests["status", MANY].total() <= 30
