"""Whose turn it is, on a clock that only waiting moves."""

import threading
from collections.abc import Callable

import pytest

from stages.sources.download.config import DownloadConfig
from stages.sources.download.host_queue import HostQueue, Ticket, host_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Make = Callable[..., tuple[HostQueue, Clock]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    def queue(urls: list[str], **config: object) -> tuple[HostQueue, Clock]:
        clock = Clock()

        def wait(condition: threading.Condition, timeout: float | None = None) -> bool:
            assert timeout is not None, "waits for another thread, but there is none"
            clock.now += timeout
            return True

        monkeypatch.setattr(threading.Condition, "wait", wait)
        return HostQueue(dict(enumerate(urls)), DownloadConfig(**config), clock), clock  # type: ignore[arg-type]

    return queue


def urls(host: str, count: int) -> list[str]:
    return [f"http://{host}/{i}" for i in range(count)]


def take_all(queue: HostQueue, count: int) -> list[Ticket]:
    return [queue.take() for _ in range(count)]


def test_hosts_take_turns(make: Make) -> None:
    queue, _ = make([*urls("a", 4), *urls("b", 2), *urls("c", 1)])
    assert [turn.url[7:] for turn in take_all(queue, 7)] == ["a/0", "b/0", "c/0", "a/1", "b/1", "a/2", "a/3"]


def test_a_full_host_is_passed_over_until_a_turn_comes_back(make: Make) -> None:
    queue, _ = make([*urls("a", 4), *urls("b", 3)], max_per_host=2)
    first, *_ = turns = take_all(queue, 4)
    assert sorted(turn.url[7:] for turn in turns) == ["a/0", "a/1", "b/0", "b/1"]
    with pytest.raises(AssertionError, match="waits for another thread"):
        queue.take()
    queue.give_back(first, failed=False)
    assert queue.take().url[7:] == "a/2"
    with pytest.raises(AssertionError, match="waits for another thread"):
        queue.take()


def test_starts_on_one_host_keep_their_distance_and_other_hosts_do_not_wait(make: Make) -> None:
    queue, clock = make([*urls("a", 3), *urls("b", 1)], min_interval_s=5)
    starts = [(queue.take().url[7:], clock.now - 1000) for _ in range(4)]
    assert starts == [("a/0", 0), ("b/0", 0), ("a/1", 5), ("a/2", 10)]


def test_a_url_is_tried_again_after_its_delay_and_behind_the_others(make: Make) -> None:
    queue, clock = make(urls("a", 2))
    turn = queue.take()
    turn.message, turn.tries = "HTTP Error 500", 1
    queue.give_back(turn, failed=False, retry_in_s=3)
    assert (queue.take().key, clock.now) == (1, 1000)
    again = queue.take()
    assert (again.key, again.tries, again.verdict, clock.now) == (0, 1, None, 1003)


def test_a_host_gets_the_pause_it_asks_for(make: Make) -> None:
    queue, clock = make([*urls("a", 3), *urls("b", 1)])
    queue.give_back(queue.take(), failed=True, pause_s=20)
    assert [(queue.take().url[7:], clock.now - 1000) for _ in range(3)] == [("b/0", 0), ("a/1", 20), ("a/2", 20)]


def test_a_host_that_asks_for_too_long_a_pause_is_given_up(make: Make) -> None:
    queue, clock = make([*urls("a", 3), *urls("b", 1)], max_retry_after_s=20)
    queue.give_back(queue.take(), failed=True, pause_s=21)
    rest = take_all(queue, 3)
    verdict = "host_unreachable: a requested a pause of 21 s"
    assert [(t.url[7:], t.verdict) for t in rest] == [("a/1", verdict), ("a/2", verdict), ("b/0", None)]
    assert clock.now == 1000


def test_a_host_is_given_up_after_failures_in_a_row(make: Make) -> None:
    queue, _ = make(urls("a", 9), max_host_failures=3)
    for failed in (True, True, False, True, None, True):
        turn = queue.take()
        assert turn.verdict is None
        queue.give_back(turn, failed=failed)
    waits, tried = queue.take(), queue.take()
    tried.message = "timed out"
    queue.give_back(tried, failed=True, retry_in_s=1)
    waits.message = "Connection refused"
    queue.give_back(waits, failed=True, retry_in_s=1)
    verdicts = {turn.key: turn.verdict for turn in take_all(queue, 3)}
    assert verdicts == {
        8: "host_unreachable: a failed 3 times in a row",
        tried.key: "timed out",
        waits.key: "Connection refused",
    }


def test_a_download_that_gets_nowhere_gives_its_place_to_another(make: Make) -> None:
    queue, clock = make([*urls("a", 1), *urls("b", 1), *urls("c", 1), *urls("d", 1)], threads=2)
    stuck, moving = take_all(queue, 2)
    moving.received = lambda: int(1000 * (clock.now - 999))
    third = queue.take()
    assert (third.url[7:], clock.now - 1000, stuck.aside, moving.aside) == ("c/0", 2, True, False)
    third.received = moving.received
    queue.give_back(stuck, failed=False)
    assert not queue._active[True]
    third.fetched = True
    moving.tries += 1
    queue.give_back(moving, failed=False)
    assert (queue.take().url[7:], clock.now - 1000) == ("d/0", 2)


def test_a_host_in_doubt_takes_no_place_from_the_others(make: Make) -> None:
    queue, clock = make([*urls("a", 9), *urls("b", 3)], threads=1)
    queue.give_back(queue.take(), failed=True)
    assert [(turn.url[7:], turn.aside) for turn in take_all(queue, 4)] == [
        ("b/0", False),
        ("a/1", True),
        ("a/2", True),
        ("a/3", True),
    ]
    assert clock.now == 1000
    assert (queue.take().url[7:], clock.now) == ("b/1", 1002), "b/0 got nowhere; of a, too many are waited for"


def test_failures_of_a_host_are_remembered_for_the_next_shard_and_for_a_while(make: Make) -> None:
    _, clock = make([])
    failures: dict[str, tuple[int, float]] = {}
    config = DownloadConfig(max_host_failures=3)

    def given_up_after(failed: bool) -> int:
        queue = HostQueue(dict(enumerate(urls("a", 5))), config, clock, failures)
        for tries in range(5):
            turn = queue.take()
            if turn.verdict is not None:
                return tries
            queue.give_back(turn, failed=failed)
        return 5

    assert given_up_after(failed=True) == 3
    assert given_up_after(failed=True) == 1, "one more chance"
    clock.now += 601
    assert given_up_after(failed=True) == 3, "forgotten"
    assert given_up_after(failed=False) == 5
    assert failures == {}


def test_giving_up_ends_all(make: Make) -> None:
    queue, _ = make([*urls("a", 2), *urls("b", 1)])
    active = queue.take()
    queue.give_up("stopped")
    queue.give_back(active, retry_in_s=60)
    assert {(turn.key, turn.verdict) for turn in take_all(queue, 3)} == {(i, "stopped") for i in range(3)}


def test_threads_get_each_url_once_and_never_more_of_a_host_than_allowed() -> None:
    names = [f"h{i % 7}" for i in range(700)]
    queue = HostQueue(
        {i: f"http://{name}/{i}" for i, name in enumerate(names)}, DownloadConfig(max_per_host=2, retries=1)
    )
    lock, active, most, results = threading.Lock(), dict.fromkeys(names, 0), dict.fromkeys(names, 0), []

    def work() -> None:
        for _ in range(70):
            while True:
                turn = queue.take()
                name = host_of(turn.url)
                with lock:
                    active[name] += 1
                    most[name] = max(most[name], active[name])
                turn.tries += 1
                retry = turn.key % 3 == 0 and turn.tries == 1
                with lock:
                    active[name] -= 1
                queue.give_back(turn, failed=False, retry_in_s=0.001 if retry else None)
                if not retry:
                    break
            with lock:
                results.append(turn.key)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == list(range(700))
    assert max(most.values()) <= 2


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://Example.org/a", "example.org"),
        ("https://example.org:443/a", "example.org"),
        ("http://example.org:80/a", "example.org"),
        ("http://user:pass@example.org./a", "example.org"),
        ("http://example.org:8080/a", "example.org:8080"),
        ("http://[::1]:80/", "[::1]"),
        ("http://[::80]/", "[::80]"),
        ("http://h:x/", "h:x"),
        ("http:///x", ""),
    ],
)
def test_a_host_is_what_stands_in_the_url(url: str, host: str) -> None:
    assert host_of(url) == host
