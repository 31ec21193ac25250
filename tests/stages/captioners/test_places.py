"""How shards that are asked about at the same time share the places for requests."""

import threading

from stages.captioners.places import Call, Places


def fill(call: Call) -> int:
    """Takes all that it may."""
    taken = 0
    while call.take(wait=False):
        taken += 1
    return taken


def test_a_later_shard_may_have_a_third_of_what_the_one_before_may() -> None:
    places = Places(90)
    with Call(places) as first, Call(places) as second, Call(places) as third:
        assert (first.take(wait=False), second.take(wait=False)) == (True, True)
        assert (fill(third), fill(second), fill(first)) == (10, 30 - 1, 90 - 10 - 30 - 1)
        assert not places.free


def test_places_that_are_free_go_to_the_next_once_a_shard_has_no_more_questions() -> None:
    places = Places(9)
    with Call(places) as first, Call(places) as second:
        assert fill(first) == 9
        first.give_back(wants_more=False)
        for _ in range(8):
            first.give_back()
        assert fill(second) == 9


def test_every_shard_may_have_one_place() -> None:
    places = Places(3)
    with Call(places) as a, Call(places) as b, Call(places) as c:
        assert [call.take(wait=False) for call in (a, b, c)] == [True] * 3
        assert [call.take(wait=False) for call in (a, b, c)] == [False] * 3


def test_a_shard_waits_for_a_place_and_gets_the_one_that_is_given_back() -> None:
    places = Places(1)
    got = threading.Event()
    with Call(places) as first, Call(places) as second:
        assert first.take(wait=False)

        def wait() -> None:
            second.take(wait=True)
            got.set()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert not got.wait(0.05)
        first.give_back()
        assert got.wait(10)
        thread.join()


def test_equal_shards_that_begin_together_do_not_end_together() -> None:
    """Each answer frees a place, for which all shards reach in turn."""
    places, questions = Places(72), 1000
    with Call(places) as a, Call(places) as b, Call(places) as c:
        left, held = dict.fromkeys((a, b, c), questions), {a: [], b: [], c: []}
        ended: dict[Call, int] = {}
        time = 0
        while len(ended) < 2:
            time += 1
            asking = [call for call in left if left[call] and call.take(wait=False)]
            for call in asking:
                left[call] -= 1
                held[call].append(time)
            for call, since in held.items():
                while since and since[0] <= time - 30:
                    since.pop(0)
                    call.give_back(wants_more=bool(left[call]))
                if not left[call] and not since:
                    ended.setdefault(call, time)
        first, second = ended.values()
    assert second - first > 0.2 * first
