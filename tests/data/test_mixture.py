"""Mixtures of real datasets: rows, cells, epochs, caps, errors."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import flix
from flix.core.sampling.schedule import probabilities
from flix.data import HeldOut, HeldOutError, Mixture, MixtureError, Source
from tests.helpers.data import HELD_OUT, SIZES, datasets, rows_of

Dataset = datasets.Dataset


def test_rows_carry_their_features_and_held_out_ones_never_come(sources):
    mixture = Mixture(sources, held_out=HELD_OUT)
    assert mixture.cells == ("language=hau,task=ner", "language=swa,task=ner", "language=hau,task=topic")  # fmt: skip
    assert mixture.held_out_cells == ("language=swa,task=topic",)
    assert mixture.sizes == {"language=hau,task=ner": 50, "language=swa,task=ner": 20, "language=hau,task=topic": 30}  # fmt: skip
    assert list(mixture.probabilities.values()) == pytest.approx(probabilities([50, 20, 30], 2.0))
    assert len(mixture.train) == mixture.epoch_size == 100
    for epoch in range(4):
        mixture.train.set_epoch(epoch)
        assert mixture.train.epoch == epoch
        rows = list(mixture.train)
        assert len(rows) == 100
        for row in rows:
            assert row["text"].startswith(f"{row['language']}-{row['task']}-")
        counts = Counter((row["language"], row["task"]) for row in rows)
        assert ("swa", "topic") not in counts
        wanted = np.array(list(mixture.probabilities.values())) * 100
        found = [counts["hau", "ner"], counts["swa", "ner"], counts["hau", "topic"]]
        assert np.abs(found - wanted).max() < 2
    held = mixture.held_out
    assert held["text"][:] == [f"swa-topic-{i}" for i in range(10)]
    assert set(held["language"][:]) == {"swa"} and held.column_names == ["text", "language", "task"]


def test_epochs_are_datasets_with_the_same_rows(sources):
    mixture = Mixture(sources, held_out=HELD_OUT, epoch_size=70)
    seen = Counter()
    for epoch in range(3):
        whole = mixture.epoch(epoch)
        assert isinstance(whole, Dataset)
        mixture.train.set_epoch(epoch)
        assert list(whole) == list(mixture.train)
        seen.update(whole["text"][:])
    # By index alone: the texts are those of the sources, in the same memory.
    places = {
        chunk.buffers()[-1].address
        for table in [mixture.epoch(0), mixture.epoch(1), *(data for data, _ in sources)]
        for chunk in table.data.column("text").chunks
    }
    assert len(places) == len(sources)
    for language, task in [("hau", "ner"), ("swa", "ner"), ("hau", "topic")]:
        counts = [seen[f"{language}-{task}-{i}"] for i in range(SIZES[language, task])]
        assert max(counts) - min(counts) <= 1
    again = Mixture(sources, held_out=HELD_OUT, epoch_size=70)
    assert again.epoch(2)["text"][:] == mixture.epoch(2)["text"][:]
    other = Mixture(sources, held_out=HELD_OUT, epoch_size=70, seed=1)
    assert other.epoch(2)["text"][:] != mixture.epoch(2)["text"][:]


def test_reading_by_position(sources):
    train = Mixture(sources, held_out=HELD_OUT).train
    rows = list(train)
    assert train[3] == rows[3] and train[-1] == rows[-1] and train[np.int64(5)] == rows[5]
    assert train[10:14] == rows[10:14]
    assert train.__getitems__([7, 2, 7]) == [rows[7], rows[2], rows[7]]
    for position in (100, -101):
        with pytest.raises(IndexError, match="of an epoch of 100 rows"):
            train[position]
    for epoch in (-1, 1.5):
        with pytest.raises(MixtureError, match="an epoch must be a whole number"):
            train.set_epoch(epoch)


def test_sources_in_all_forms():
    columns = Dataset.from_dict(
        {"text": ["a", "b", "c"], "language": ["hau", "swa", "hau"], "task": ["ner"] * 3}
    )
    single = Mixture(columns)
    assert single.sizes == {"language=hau,task=ner": 2, "language=swa,task=ner": 1}
    half = columns.remove_columns("task"), {"task": "pos"}
    by_name = Mixture({"plain": columns, "half": half, "full": Source(*rows_of("yor", "ner", 2))})
    assert [source.name for source in by_name.sources] == ["plain", "half", "full"]
    assert by_name.sizes["language=hau,task=pos"] == 2 and len(by_name.sizes) == 5
    assert Mixture(half).cells == ("language=hau,task=pos", "language=swa,task=pos")
    # Other columns, by name or because sources declare them.
    other = columns.rename_column("language", "dialect")
    assert Mixture(other, columns=["dialect"]).cells == ("dialect=hau", "dialect=swa")
    declared = Mixture([(columns, {"domain": "news"})])
    assert declared.columns == ("language", "task", "domain")
    # A part of the rows, in another order: numbers of rows are those of the selection.
    chosen = columns.select([2, 1])
    assert {row["text"] for row in Mixture(chosen).train} == {"c", "b"}
    assert {row["text"] for row in Mixture(chosen).epoch(0)} == {"c", "b"}


def test_code_switched_rows():
    listed = Dataset.from_dict(
        {
            "text": ["a", "b", "c", "d"],
            "language": [["hau", "swa"], ["hau"], ["swa", "hau"], ["yor"]],
            "task": ["ner", "ner", "topic", "topic"],
        }
    )
    mixture = Mixture(listed, held_out=[{"language": "swa", "task": "topic"}])
    assert mixture.cells == ("language=hau+swa,task=ner", "language=hau,task=ner", "language=yor,task=topic")  # fmt: skip
    assert mixture.held_out["text"][:] == ["c"]
    weighted = Dataset.from_dict(
        {"text": ["a", "b"], "language": [{"hau": 0.7, "swa": 0.3}, {"hau": 1.0, "swa": None}]}
    )
    both = Mixture([weighted, (listed.select([3]).select_columns("text"), {"language": "yor"})])
    rows = {row["text"]: row["language"] for row in both.train}
    assert rows == {"a": {"hau": 0.7, "swa": 0.3}, "b": {"hau": 1.0}, "d": "yor"}
    encoded = both.registry().encode([{"language": language} for language in rows.values()])
    assert (encoded.ids >= 0).sum() == 4
    with pytest.raises(MixtureError, match=r"declare \['hau'\] instead of 'hau'"):
        both.epoch(0)


def test_rows_without_a_feature_must_be_declared():
    code = Dataset.from_dict({"text": ["x = 1"]}), {"language": None, "task": "code"}
    mixture = Mixture([rows_of("hau", "ner", 2), code], held_out=())
    assert "task=code" in mixture.cells
    assert {row["text"]: row["language"] for row in mixture.train}["x = 1"] is None
    assert ("language", None) not in mixture.registry()
    with pytest.raises(MixtureError, match=r"source '1' lacks the feature column 'language'"):
        Mixture([rows_of("hau", "ner", 2), (code[0], {"task": "code"})])
    holes = Dataset.from_dict({"language": ["hau", None], "task": ["ner", "ner"]})
    with pytest.raises(MixtureError, match=r"source '0', row 1: the feature column 'language'"):
        Mixture(holes)


def test_caps():
    sources = [rows_of(*cell, count) for cell, count in SIZES.items()]

    def counted(cap):
        found = Mixture(sources, temperature=1.0, cap=cap).counted.values()
        return dict(zip(SIZES, found, strict=True))

    assert list(counted(25).values()) == [25, 20, 25, 10]
    assert list(counted({"task": 25}).values()) == [25, 20, 25, 10]
    assert list(counted({"task": {"topic": 15}}).values()) == [50, 20, 15, 10]
    least = {("language", "hau"): 15, "task": {"topic": 5}}
    for cap in (least, dict(reversed(least.items()))):
        assert list(counted(cap).values()) == [15, 20, 5, 5]
    assert list(counted({"language=hau,task=ner": 7}).values()) == [7, 20, 30, 10]
    # Each epoch takes another part of a capped cell.
    mixture = Mixture(sources, temperature=1.0, cap=10)
    parts = [
        {row["text"] for row in mixture.epoch(e) if row["text"].startswith("hau-ner")}
        for e in range(5)
    ]
    assert [len(part) for part in parts] == [10] * 5 and len(set().union(*parts)) == 50
    for cap, message in [
        (0, "a cap must be a whole number of 1 or more, got 0"),
        (2.5, "whole number"),
        ({"task": {"ner": 0}}, "the cap of task=ner must be"),
        ({"tsk": 3}, r"no group or trained cell 'tsk' .did you mean 'task'"),
        ({"task": {"nre": 3}}, r"no row has the task 'nre' .did you mean 'ner'"),
    ]:
        with pytest.raises(MixtureError, match=message):
            counted(cap)


def test_registry_and_feature_sizes(sources):
    mixture = Mixture(sources, held_out=[*HELD_OUT, {"task": "topic"}])
    registry = mixture.registry()
    assert registry == flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "topic"]})
    sizes = mixture.feature_sizes()
    assert sizes == {("language", "hau"): 50, ("language", "swa"): 20, ("task", "ner"): 70, ("task", "topic"): 0}  # fmt: skip
    ranks = flix.ranks.proportional(budget=30, sizes=sizes)(registry)
    assert sum(ranks.values()) == 30
    given = flix.FeatureRegistry(
        {"task": ["ner", "topic"], "language": ["swa", "hau", "ibo"], "shared": ["all"]},
        {("language", "hau"): [("shared", "all")]},
    )
    mixture = Mixture(sources, registry=given, held_out=HELD_OUT)
    assert mixture.columns == ("task", "language") and mixture.registry() is given
    assert mixture.feature_sizes()["shared", "all"] == 80
    assert mixture.feature_sizes()["language", "ibo"] == 0
    held = Mixture(sources, registry=given, held_out=HeldOut([{"shared": "all"}]))
    assert held.cells == ("task=ner,language=swa", "task=topic,language=swa")
    lacking = flix.FeatureRegistry({"language": ["hau"], "task": ["ner", "topic"]})
    with pytest.raises(flix.FeatureError, match="no feature 'swa'"):
        Mixture(sources, registry=lacking)


def test_formats_and_transforms_of_the_sources_stay():
    torch = pytest.importorskip("torch")
    numbers = Dataset.from_dict({"x": [1, 2], "language": ["hau"] * 2}).with_format("torch")
    lazy = Dataset.from_dict({"x": [3, 4]}).with_transform(
        lambda batch: {"y": [10 * x for x in batch["x"]]}
    )
    rows = list(Mixture([numbers, (lazy, {"language": "swa"})]).train)
    for row in rows:
        if row["language"] == "hau":
            assert isinstance(row["x"], torch.Tensor)
        else:
            assert row["y"] in (30, 40) and "x" not in row
    assert len(rows) == 4


def test_the_table(sources):
    text = str(Mixture(sources, held_out=HELD_OUT, cap=40))
    lines = text.splitlines()
    assert lines[0].split() == ["cell", "rows", "counted", "p", "an", "epoch"]
    assert lines[1].split() == ["language=hau,task=ner", "50", "40", "0.3886", "35"]
    assert lines[4].split() == ["language=swa,task=topic", "10", "held", "out"]
    assert lines[5] == "3 cells, 90 rows an epoch, temperature 2"


def test_a_held_out_row_raises_whatever_led_to_it(sources):
    train = Mixture(sources, held_out=HELD_OUT).train
    assert train[0]
    wrong = train._order.copy()
    wrong[train._schedule.rows(0)[4]] = 105  # a row of the held-out cell
    train._order = wrong
    assert train[3]
    with pytest.raises(HeldOutError, match="source '3', row 5 is of language=swa,task=topic"):
        train[4]


LINES = Dataset.from_dict({"text": ["a"], "language": ["hau"], "task": ["ner"]})


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "at least one source"),
        ({}, {}, "at least one source"),
        ([3], {}, "source '0' must be a datasets.Dataset or IterableDataset.*got int"),
        (datasets.DatasetDict(train=LINES), {}, "choose one of its splits: train"),
        ([Source(LINES, name="x"), Source(LINES, name="x")], {}, "2 sources of the name 'x'"),
        ({"none": LINES.select([])}, {}, "source 'none' has no rows; a cell needs"),
        ([Source(LINES, size=3)], {}, "knows its size"),
        ([(LINES, {"task": "ner"})], {}, "declares 'task' and has a column of that name"),
        (LINES, {"columns": ["language", "tsk"]}, "lacks the feature column 'tsk' .did you mean 'task'"),
        (LINES, {"columns": []}, "columns must be names"),
        ([(LINES, {"taks": "ner"})], {"columns": ["task"]}, "declares 'taks', which is not a feature column"),
        (LINES.select_columns("text"), {}, "name the feature columns"),
        (LINES.remove_columns("task").add_column("task", [3]), {}, "must hold names, got int64"),
        (LINES, {"temperature": 0}, "temperature must be a number above 0"),
        (LINES, {"epoch_size": 0}, "epoch_size must be"),
        (LINES, {"seed": -1}, "seed must be"),
        (LINES, {"held_out": [{"language": "hua"}]}, r"held_out\[0\].*matches no row.*did you mean 'hau'"),
        (LINES, {"held_out": [{"language": "hau"}]}, "covers every cell .*nothing is left"),
    ],
)  # fmt: skip
def test_mistakes(given, options, message):
    with pytest.raises(MixtureError, match=message):
        Mixture(given, **options)


@pytest.mark.parametrize("value", ["", ["hau", ""], {"hau": float("nan")}])
def test_ill_formed_features_name_source_and_row(value):
    good = value if value and isinstance(value, str) else ["hau"] if isinstance(value, list) else None  # fmt: skip
    rows = [good or "hau", value] if isinstance(value, str | list) else [{"hau": 1.0}, value]
    data = Dataset.from_dict({"language": rows})
    with pytest.raises(flix.FeatureError, match="source '0', row 1: "):
        Mixture(data)
    with pytest.raises(flix.FeatureError, match="source '0': "):
        Mixture((LINES.select_columns("text"), {"language": value}))


def test_without_datasets_the_error_names_the_extra():
    code = (
        "import sys; import flix.data; assert 'datasets' not in sys.modules\n"
        "sys.modules['datasets'] = None\n"
        "try: flix.data.Mixture([])\n"
        "except flix.MissingFrameworkError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'pip install "flix-peft[transformers]"' in result.stdout
