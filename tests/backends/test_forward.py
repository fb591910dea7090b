"""What a forward runs under is the thread's or task's own, nests, overlaps, and ends with its block."""

from __future__ import annotations

import asyncio
import threading

import pytest

from flix.backends.forward import Forward, by_hand


def test_what_is_in_force_nests_and_ends_also_by_an_error():
    current = Forward()
    with current.under(routing=1):
        with pytest.raises(ValueError, match="stop"), current.under(routing=2, present=3):
            assert (current.routing, current.present) == (2, 3)
            raise ValueError("stop")
        assert (current.routing, current.present) == (1, None)
        with current.under(present=4):
            assert (current.routing, current.present) == (1, 4)
    assert (current.routing, current.present) == (None, None)


def test_other_threads_do_not_see_it():
    current, seen = Forward(), []
    with current.under(routing=1):
        thread = threading.Thread(target=lambda: seen.append(current.routing))
        thread.start()
        thread.join()
    assert seen == [None]


def test_asyncio_tasks_each_see_their_own():
    current = Forward()

    async def ask(value):
        with current.under(routing=value):
            await asyncio.sleep(0)
            started = asyncio.create_task(inside())
            return current.routing, await started, await asyncio.to_thread(lambda: current.routing)

    async def inside():
        return current.routing

    async def all_at_once():
        return await asyncio.gather(*map(ask, range(8)))

    assert asyncio.run(all_at_once()) == [(n, n, n) for n in range(8)]
    assert current.routing is None


def test_blocks_that_overlap_close_in_any_order_and_leave_nothing_behind():
    current = Forward()
    first, second = current.under(routing=1), current.under(routing=2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert current.routing == 2
    second.__exit__(None, None, None)
    assert current.routing is None


def test_what_is_off_counts_its_blocks_and_is_told_by_identity():
    current, one, other = Forward(), [], []
    current.switch(one, 1)
    current.switch(one, 1)
    current.switch(other, 1)
    current.switch(one, -1)
    assert current.is_off(one) and current.is_off(other) and not current.is_off([])
    seen = []
    thread = threading.Thread(target=lambda: seen.append(current.is_off(one)))
    thread.start()
    thread.join()
    assert seen == [False]
    current.switch(one, -1)
    current.switch(one, -1)  # one too many changes nothing
    assert not current.is_off(one) and current.is_off(other)
    current.switch(other, -1)
    assert current.blocks == ()


def test_what_was_put_off_runs_under_what_was_in_force():
    current, state = Forward(), object()
    current.switch(state, 1)
    with current.under(routing=1):
        held = current.blocks
    current.switch(state, -1)
    with current.under(routing=2):
        with current.resumed(held):
            assert current.routing == 1 and current.is_off(state)
        assert current.routing == 2 and not current.is_off(state)


def test_routing_by_hand_is_checked_before_it_is_in_force():
    current = Forward()
    route = by_hand(current, lambda registry, features, weights: (registry, features, weights))
    with route("registry", "ids", "weights"):
        assert current.routing == ("registry", "ids", "weights")
        with route("registry", "others"):
            assert current.routing == ("registry", "others", None)
        assert current.routing == ("registry", "ids", "weights")

    def refuse(*_):
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"), by_hand(current, refuse)("registry", "ids"):
        pass
    assert current.routing is None
