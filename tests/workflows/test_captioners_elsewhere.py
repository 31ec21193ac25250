"""Captioners on Ray, and with a run folder on an object store (moto's server): limits, kills, kept answers."""

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage.lock import LEASE
from pipeline.storage.open import open_storage
from tests.caption_server import CaptionServer, serve
from tests.commands import Result, call
from tests.object_store import ObjectStore, object_store
from tests.processes import descendants, wait_until_gone
from tests.runs import REPOSITORY, command, precompute, store_bytes
from tests.workflows.test_captioners import captioner, probes_left_out

CONFIG = ("source.num_samples=60", "shard_size=10", "images.sizes_px=[8]", "encoders=[]", "keep_originals=true")
KEYS = 59
"""Samples: one link of the synthetic source is dead."""
EXECUTORS = ["local", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "run"
    with serve() as server:
        precompute(out, *CONFIG, captioner(server))
    return store_bytes(out)


def run(out: str, executor: str, *settings: str) -> Result:
    return call("run", "precompute", "--out", out, "--executor", executor, "--quiet", *CONFIG, *settings)


def asked(server: CaptionServer) -> Counter[str]:
    """How often each image of the source was asked about."""
    return Counter(each.number for each in probes_left_out(server))


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_limit_holds_on_every_executor_and_nothing_is_asked_twice(
    executor: str, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "run"
    with serve() as server:
        limited = run(str(out), executor, captioner(server, max_requests=23, max_in_flight=8))
        assert limited.code == 3
        assert "max_requests: 23 requests were answered" in limited.err
        assert asked(server).total() == 23
        assert run(str(out), executor, captioner(server)).code == 0
        assert (len(asked(server)), asked(server).total()) == (KEYS, KEYS)
    assert store_bytes(out) == whole


@pytest.mark.slow
def test_answers_are_kept_on_an_object_store(s3: ObjectStore, whole: dict[str, bytes]) -> None:
    url = f"{s3.url}/limited"
    with serve() as server:
        assert run(url, "inline", captioner(server, max_requests=23, max_in_flight=8)).code == 3
        kept = s3.keys("limited/captioners/long/")
        assert sum(data.count(b'"text"') for data in kept.values()) == 23
        assert run(url, "inline", captioner(server)).code == 0
        assert (len(asked(server)), asked(server).total()) == (KEYS, KEYS)
    assert s3.keys("limited/store/") == whole
    assert list(s3.keys("limited/captioners/long/")) == ["model.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "executor"), [("s3", "local"), pytest.param("folder", "ray", marks=pytest.mark.ray)]
)
def test_a_killed_run_ends_with_the_same_bytes(
    place: str, executor: str, s3: ObjectStore, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = f"{s3.url}/killed" if place == "s3" else str(tmp_path / "run")
    children: list[int] = []
    with serve(CaptionServer(seconds=0.1)) as server:
        config = captioner(server, max_in_flight=4)
        for _ in range(2):
            before = server.answered
            arguments = command("run", "precompute", "--out", out, "--executor", executor, "--quiet", *CONFIG, config)
            process = subprocess.Popen(
                arguments,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=REPOSITORY,
                start_new_session=True,
            )
            ends = time.monotonic() + 120
            while server.answered < before + 16 and process.poll() is None and time.monotonic() < ends:
                time.sleep(0.02)
            children += descendants(process.pid)
            process.kill()
            assert process.wait() < 0, "it ended before it could be killed"
            if place == "s3":
                open_storage(out).delete(LEASE)  # as if it had expired
        server.seconds = 0
        result = run(out, executor, config)
        assert result.code == 0, result.err
        again = asked(server).total() - KEYS
    assert again <= 2 * 3 * 10, "a kill costs at most the answers of the shards in work"
    assert (s3.keys("killed/store/") if place == "s3" else store_bytes(tmp_path / "run")) == whole
    assert not wait_until_gone(children, timeout_s=150)
