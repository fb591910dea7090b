"""Held-out cells are never sampled: over random data, holdouts, temperatures, caps and epochs."""

from __future__ import annotations

from itertools import islice, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flix.data import HeldOutError, Mixture, MixtureError, Source, streaming
from tests.helpers.data import datasets, rows_of

LANGUAGES, TASKS = ["hau", "swa", "yor"], ["ner", "topic"]


def names(choices, most):
    return st.lists(st.sampled_from(choices), min_size=1, max_size=most, unique=True)


rows = st.lists(st.tuples(names(LANGUAGES, 2), names(TASKS, 2)), min_size=1, max_size=12)
declared = st.tuples(st.sampled_from(LANGUAGES), st.sampled_from(TASKS), st.integers(1, 5))
entries = st.lists(
    st.fixed_dictionaries(
        {}, optional={"language": st.sampled_from(LANGUAGES), "task": st.sampled_from(TASKS)}
    ).filter(bool),
    max_size=3,
)
options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.0, float("inf")]),
        "cap": st.sampled_from([None, 1, 3]),
        "seed": st.integers(0, 5),
        "epoch_size": st.sampled_from([None, 1, 7, 40]),
    }
)
quiet = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def is_held(entries, languages, tasks):
    """The rule once more, from its definition: some combination of the row's names matches some entry."""
    return any(
        entry.get("language", language) == language and entry.get("task", task) == task
        for entry in entries
        for language, task in product(languages, tasks)
    )


def build(mixed, constant, entries, options, stream=False):
    """The mixture, and by row number: whether it is held out."""
    held = {}
    for languages, tasks in mixed:
        held[len(held)] = is_held(entries, languages, tasks)
    data = datasets.Dataset.from_dict(
        {
            "number": list(range(len(mixed))),
            "language": [languages for languages, _ in mixed],
            "task": [tasks for _, tasks in mixed],
        }
    )
    sources = [Source(data.to_iterable_dataset(), size=len(mixed)) if stream else data]
    for language, task, count in constant:
        first = len(held)
        held.update(
            dict.fromkeys(range(first, first + count), is_held(entries, [language], [task]))
        )
        part = datasets.Dataset.from_dict({"number": list(range(first, first + count))})
        sources.append((part, {"language": [language], "task": [task]}))
    return Mixture(sources, held_out=entries, **options), held


@quiet
@given(rows, st.lists(declared, max_size=3), entries, options)
def test_no_held_out_row_is_ever_in_training(mixed, constant, entries, options):
    cells = [(set(a), set(b)) for a, b in mixed] + [({a}, {b}) for a, b, _ in constant]
    matched = [any(is_held([entry], a, b) for a, b in cells) for entry in entries]
    if not all(matched) or all(is_held(entries, a, b) for a, b in cells):
        with pytest.raises(MixtureError, match=r"matches no row|nothing is left"):
            build(mixed, constant, entries, options)
        return
    mixture, held = build(mixed, constant, entries, options)
    for epoch in (0, 1, 5):
        mixture.train.set_epoch(epoch)
        numbers = [row["number"] for row in mixture.train]
        assert len(numbers) == mixture.epoch_size
        assert not any(held[number] for number in numbers)
        assert mixture.epoch(epoch)["number"][:] == numbers
    assert set(mixture.held_out["number"][:]) == {n for n, out in held.items() if out}
    streamed = [row["number"] for row in islice(mixture.stream(epoch=1), 300)]
    assert streamed and not any(held[number] for number in streamed)


@settings(quiet, max_examples=30)
@given(rows, st.lists(declared, max_size=2), entries, options, st.sampled_from([0, 5]))
def test_nor_in_a_stream_of_streams(mixed, constant, entries, options, buffer):
    options = {**options, "epoch_size": None}
    # What a stream holds is not known before it is read: entries that match nothing are not an error.
    mixture, held = build(mixed, constant, entries, options, stream=True)
    if all(held[number] for number in range(len(mixed))):
        with pytest.raises(MixtureError, match="source '0': every row of the stream is held out"):
            mixture.stream(shuffle_buffer=buffer)
        return
    numbers = [row["number"] for row in islice(mixture.stream(shuffle_buffer=buffer), 300)]
    assert not any(held[number] for number in numbers)
    # The default stops when every row was seen.
    if len(numbers) < 300:
        assert set(numbers) == {n for n, out in held.items() if not out}
    kept = [row["number"] for row in mixture.stream_held_out()]
    assert sorted(kept) == [n for n, out in held.items() if out]


def test_the_streams_guard_raises_where_the_filter_fails(monkeypatch):
    data = datasets.Dataset.from_dict({"language": ["hau", "swa"], "task": ["ner", "topic"]})
    mixture = Mixture(
        Source(data.to_iterable_dataset(), size=2), held_out=[{"language": "swa", "task": "topic"}]
    )
    assert [row["language"] for row in mixture.stream()] == ["hau"]
    monkeypatch.setattr(streaming.KeepTrained, "__call__", lambda self, *values: True)
    with pytest.raises(HeldOutError, match="a row of language=swa,task=topic was drawn"):
        list(mixture.stream())


def test_nothing_is_refused_that_may_be_trained():
    """The other side: what is not held out is all seen."""
    sources = [rows_of(language, task, 3) for language, task in product(LANGUAGES, TASKS)]
    mixture = Mixture(sources, held_out=[{"language": "swa", "task": "topic"}], temperature=1.0)
    assert len({row["text"] for row in mixture.train}) == 15
    assert {row["text"] for row in mixture.stream()} == {row["text"] for row in mixture.train}
