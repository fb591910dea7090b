"""Mixtures of streams: shares, resumption, what they cannot do."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import pytest

from flix.data import Mixture, MixtureError, Source
from tests.helpers.data import HELD_OUT, datasets, rows_of

torch = pytest.importorskip("torch")


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def stream_of(count: int, language: str, task: str, **options: Any) -> Source:
    data, features = rows_of(language, task, count)
    return Source(data.to_iterable_dataset(), features, size=count, **options)


def test_streams_follow_the_probabilities():
    sources = [stream_of(900, "hau", "ner"), rows_of("swa", "ner", 100), stream_of(50, "yor", "topic")]  # fmt: skip
    made = Mixture(sources, held_out=[{"task": "topic"}])
    assert made.sizes == {"language=swa,task=ner": 100, "language=hau,task=ner": 900}
    assert made.held_out_cells == ("language=yor,task=topic",)
    rows = list(islice(made.stream(), 1000))
    share = sum(row["language"] == "hau" for row in rows) / 1000
    assert abs(share - 0.75) < 0.05
    assert {row["task"] for row in rows} == {"ner"}
    assert list(rows[0]) == ["text", "language", "task"]
    assert len(list(made.stream_held_out())) == 50
    assert made.registry().names("language") == ("swa", "hau", "yor")
    assert made.feature_sizes()["language", "hau"] == 900
    assert list(made.stream(epoch=1).take(50)) != rows[:50]
    assert list(made.stream().take(50)) == rows[:50]
    assert not list(Mixture(sources[:1]).stream_held_out())
    # Rows that have numbers are shuffled, in each epoch anew.
    alone = Mixture([rows_of("swa", "ner", 30)])
    orders = [texts(list(alone.stream(epoch=epoch))) for epoch in range(2)]
    plain = [f"swa-ner-{i}" for i in range(30)]
    assert [sorted(order) for order in orders] == [sorted(plain)] * 2
    assert orders[0] != orders[1] and plain not in orders
    # A cell that is partly streamed has one share.
    both = Mixture([stream_of(900, "hau", "ner"), rows_of("hau", "ner", 100), rows_of("swa", "ner", 250)])  # fmt: skip
    assert both.sizes == {"language=hau,task=ner": 1000, "language=swa,task=ner": 250}
    swahili = sum(row["language"] == "swa" for row in islice(both.stream(), 1000)) / 1000
    assert abs(swahili - 1 / 3) < 0.05


def test_a_stream_resumes_where_it_was(sources):
    for made in (
        Mixture(sources, held_out=HELD_OUT),
        Mixture([stream_of(30, "hau", "ner"), *sources[2:]], held_out=HELD_OUT),
    ):
        stream = made.stream()
        rows = iter(stream)
        for _ in range(17):
            next(rows)
        state = stream.state_dict()
        rest = list(rows)
        other = made.stream()
        other.load_state_dict(state)
        assert list(other) == rest and len(rest) > 20


def test_a_buffer_shuffles_by_epoch(sources):
    stream = Mixture([stream_of(60, "hau", "ner")]).stream(shuffle_buffer=20)
    first = texts(list(stream))
    assert first != sorted(first) and len(set(first)) == 60
    stream.set_epoch(1)
    assert texts(list(stream)) != first


def test_a_stream_in_a_loader():
    stream = Mixture([stream_of(6, "hau", "ner"), rows_of("swa", "ner", 4)]).stream()
    loader = torch.utils.data.DataLoader(stream, batch_size=4, collate_fn=texts)
    assert set(chain.from_iterable(loader)) == {f"hau-ner-{i}" for i in range(6)} | {f"swa-ner-{i}" for i in range(4)}  # fmt: skip


def test_what_a_streamed_mixture_cannot_do():
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "language": ["hau", "swa"]})
    unknown = Source(data.to_iterable_dataset(), {"task": "ner"}, name="web", size=2)
    made = Mixture([unknown, rows_of("hau", "topic", 3)])
    assert made.cells[1] == "task=ner,... (web)"
    for use in (lambda: made.train, lambda: made.epoch(0), lambda: made.held_out):
        with pytest.raises(MixtureError, match=r"'web' is streamed; use mixture.stream\(\)"):
            use()
    with pytest.raises(MixtureError, match="give the mixture a registry"):
        made.registry()
    with pytest.raises(MixtureError, match="how many rows its features have is not known"):
        made.feature_sizes()
    with pytest.raises(MixtureError, match="stopping_strategy must be one of all_exhausted"):
        made.stream(stopping_strategy="all")
    with pytest.raises(MixtureError, match=r"does not say how many rows .* size=\.\.\."):
        Mixture([data.to_iterable_dataset()])
    with pytest.raises(MixtureError, match="lacks the feature column 'task'"):
        Mixture([Source(data.to_iterable_dataset(), size=2), rows_of("hau", "topic", 3)])
    holes = datasets.Dataset.from_dict({"language": ["hau", None]}).to_iterable_dataset()
    with pytest.raises(MixtureError, match="source 'holes': a row of the stream holds nothing"):
        list(Mixture({"holes": Source(holes, size=2)}).stream())


def test_a_stream_knows_its_size_from_its_information():
    data, features = rows_of("hau", "ner", 4)
    info = datasets.DatasetInfo(splits=[{"name": "train", "num_examples": 40}])
    stream = datasets.IterableDataset(
        data.to_iterable_dataset()._ex_iterable, info=info, split=datasets.Split.TRAIN
    )
    assert Mixture([(stream, features)]).sizes == {"language=hau,task=ner": 40}
