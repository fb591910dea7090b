"""What a forward runs under is the thread's own, nests, and ends with its block."""

from __future__ import annotations

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
