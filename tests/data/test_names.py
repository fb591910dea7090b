"""Names in data: held-out rows under any Unicode form, cells that print alike, empty streams, many sources."""

from __future__ import annotations

import time
import unicodedata
import warnings

import pytest

import flix
from flix.data import HeldOut, Mixture, MixtureError, Source
from tests.helpers.data import datasets, rows_of

NFC, NFD = (unicodedata.normalize(form, "español") for form in ("NFC", "NFD"))


def table(**columns):
    return datasets.Dataset.from_dict(columns)


def streamed(rows, **more):
    return Source(datasets.IterableDataset.from_generator(lambda: iter(rows)), **more)


FORMS = {
    "name": lambda name: name,
    "list": lambda name: [name],
    "weights": lambda name: {name: 0.5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [NFC, NFD])
@pytest.mark.parametrize("known", [False, True])
def test_a_held_out_name_is_held_out_in_either_form(form, given, known):
    value = FORMS[form]
    registry = flix.FeatureRegistry({"language": [NFD, "yor"], "task": ["ner"]}) if known else None
    data = table(
        text=list("abcd"), language=[value(n) for n in (NFC, NFD, NFD, "yor")], task=["ner"] * 4
    )
    held = [{"language": given, "task": "ner"}]
    made = Mixture([data], held_out=held, registry=registry)
    assert [row["text"] for row in made.train] == ["d"] and len(made.held_out) == 3
    assert made.cells == ("language=yor,task=ner",)
    assert made.held_out_cells == (f"language={NFC},task=ner",)
    assert made.registry().names("language") == (NFC, "yor")
    assert {row["text"] for row in made.stream()} == {"d"}
    assert HeldOut(held).covers({"language": value(NFD), "task": "ner"})
    stream = Mixture([Source(data.to_iterable_dataset(), size=4)], held_out=held, registry=registry)
    assert {row["text"] for row in stream.stream()} == {"d"}
    assert [row["text"] for row in stream.stream_held_out()] == ["a", "b", "c"]


def test_names_are_handed_out_as_they_are_kept():
    data = [(table(text=["a"]), {"language": NFD}), table(text=["b"], language=[NFD]), table(text=["c"], language=[NFC])]  # fmt: skip
    made = Mixture(data, columns=["language"])
    assert {row["language"] for row in made.train} == {NFC}
    assert made.cells == (f"language={NFC}",) and made.sizes[made.cells[0]] == 3
    for cap in ({"language": {NFD: 1}}, {("language", NFD): 1}, {f"language={NFD}": 1}):
        assert made.counted != Mixture(data, columns=["language"], cap=cap).counted
    two = Mixture([table(text=["a"], language=["x"], task=["y"])], cap={"task=y, language=x": 1})
    assert two.counted == {"language=x,task=y": 1}


@pytest.mark.parametrize("column", ["größe", "gro\u0308ße"])
@pytest.mark.parametrize("group", ["größe", "gro\u0308ße"])
def test_a_column_is_its_group_in_either_form(column, group):
    registry = flix.FeatureRegistry({group: ["a", "b"], "task": ["ner"]})
    data = table(**{"text": ["x", "y"], column: ["a", "b"], "task": ["ner", "ner"]})
    for columns in (None, [column, "task"]):
        made = Mixture([data], registry=registry, columns=columns, held_out=[{group: "b"}])
        assert [row["text"] for row in made.train] == ["x"]
        assert made.feature_sizes() == {("größe", "a"): 1, ("größe", "b"): 0, ("task", "ner"): 1}
    declared = Mixture([(table(text=["x"]), {group: "a", "task": "ner"})], columns=[column, "task"])
    assert declared.cells == ("größe=a,task=ner",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eng ", "U\\+0020"), ("\ufeffeng", "U\\+FEFF"), ("e\u200bng", "ZERO WIDTH SPACE"), ("eng\n", "control"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_seen_are_refused_with_their_row(name, message):
    for value in FORMS.values():
        data = table(text=["a", "b"], language=[value("eng"), value(name)], task=["ner"] * 2)
        with pytest.raises(flix.FeatureError, match=f"source '0', row 1: .*{message}"):
            Mixture([data])
        with pytest.raises(flix.FeatureError, match=message):
            list(Mixture([Source(data.to_iterable_dataset(), size=2)]).stream())
    with pytest.raises(flix.FeatureError, match=f"source 's': .*{message}"):
        Mixture({"s": (table(text=["a"]), {"language": name})})
    with pytest.raises(MixtureError, match=message):
        Mixture([table(text=["a"], language=["eng"])], held_out=[{"language": name}])


def test_names_that_are_almost_one_get_a_warning():
    data = table(text=["a", "b", "c"], language=["eng", "Eng", "yor"], task=["ner"] * 3)
    with pytest.warns(UserWarning, match="'eng' and 'Eng' differ only in case"):
        Mixture([data])
    with pytest.warns(UserWarning, match="'eng' and 'Eng' differ only in case"):
        made = Mixture([data.select([1, 2])], held_out=HeldOut([{"language": "yor"}]))
        assert not HeldOut([{"language": "eng"}]).covers({"language": made.train[0]["language"]})
    stream = Mixture([Source(data.to_iterable_dataset(), size=3)], held_out=[{"language": "eng"}])
    with pytest.warns(UserWarning, match="'eng' and 'Eng' differ only in case"):
        assert {row["language"] for row in stream.stream()} == {"Eng", "yor"}
    with pytest.raises(MixtureError, match=r"no row has the language 'ENG' .did you mean 'Eng' or 'eng'"), warnings.catch_warnings():  # fmt: skip
        warnings.simplefilter("ignore")
        Mixture([data], held_out=[{"language": "ENG"}])


PAIRS = [
    ({"language": "eng+hin"}, {"language": ["eng", "hin"]}),
    ({"language": "eng,task=ner"}, {"language": "eng", "task": "ner"}),
    ({"language": "a+b"}, {"language": '"a+b"'}),
    ({"language": ["a+b", "c"]}, {"language": ["a", "b+c"]}),
    ({"language": "eng=x"}, {"language=eng": "x"}),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_cells_that_print_alike_are_not_the_same(one, other):
    groups = dict.fromkeys([*one, *other])
    sources = [
        (table(text=[text]), {**dict.fromkeys(groups), **features})
        for text, features in (("x", one), ("y", other))
    ]
    made = Mixture(sources, columns=list(groups))
    assert len(made.train) == 2 == len(made.cells) == len(made.sizes) == len(made.probabilities)
    made.train.set_epoch(1)
    assert {row["text"] for row in made.train} == {"x", "y"}
    assert str(made).count("held out") == 0 and "2 cells, 2 rows" in str(made)
    both = Mixture(sources, columns=list(groups), cap={made.cells[1]: 1})
    assert both.counted == dict.fromkeys(made.cells, 1)


def test_a_streams_name_is_not_a_cells():
    opaque = Source(table(text=["a"], task=["x"]).to_iterable_dataset(), {"language": "l"}, name='s)="', size=1)  # fmt: skip
    plain = (table(text=["b"]), {"language": "l", "task": '... ("s)=\\"")'})
    made = Mixture([opaque, plain])
    assert len(made.cells) == 2


EMPTY = {
    "declared": (lambda: streamed([], features={"language": "hau", "task": "ner"}, size=2), "language=hau,task=ner"),
    "undeclared": (lambda: streamed([], features={"language": "hau"}, size=2), "language=hau"),
    "named": (lambda: streamed([], name="mine", size=2), "source 'mine'"),
    "known columns": (
        lambda: Source(table(text=["a"], task=["ner"]).to_iterable_dataset().take(0), {"language": "hau"}, size=2),
        "language=hau",
    ),
    "filtered": (
        lambda: Source(table(text=["a"], task=["ner"]).to_iterable_dataset().filter(lambda row: False), {"language": "hau"}, size=2),
        "language=hau",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("alone", [True, False])
def test_an_empty_stream_says_so(kind, alone):
    make, named = EMPTY[kind]
    sources = [make(), *([] if alone else [rows_of("swa", "ner", 3)])]
    with pytest.raises(MixtureError, match=f"{named}.* is empty: its stream gives no row"):
        next(iter(Mixture(sources).stream()))


def test_a_stream_of_held_out_rows_alone_says_so():
    rows = [{"text": "a", "language": "swa", "task": "ner"}] * 3
    made = Mixture([streamed(rows, size=3, name="all"), rows_of("hau", "ner", 3)], held_out=[{"language": "swa"}])  # fmt: skip
    with pytest.raises(MixtureError, match="source 'all': every row of the stream is held out"):
        made.stream()
    assert len(list(made.stream_held_out())) == 3


def test_rows_that_name_no_known_feature_are_named_with_their_source():
    registry = flix.FeatureRegistry({"language": ["hau"], "task": ["ner"]})
    rows = [{"text": "a", "language": "hau", "task": "ner"}, {"text": "b", "language": "zul", "task": "ner"}]  # fmt: skip
    unknown = r"'language' has no feature 'zul'.*it has: hau"
    with pytest.raises(flix.FeatureError, match=f"source 's', row 1: group {unknown}"):
        Mixture({"s": datasets.Dataset.from_list(rows)}, registry=registry)
    with pytest.raises(flix.FeatureError, match=f"source 's': group {unknown}"):
        list(Mixture({"s": streamed(rows, size=2)}, registry=registry).stream())
    with pytest.raises(flix.FeatureError, match=f"source 's': group {unknown}"):
        Mixture(
            {"s": streamed([{"text": "a", "task": "ner"}], features={"language": "zul"}, size=2)},
            registry=registry,
        )
    with pytest.raises(MixtureError, match=r"held_out\[0\]: group " + unknown):
        Mixture({"s": streamed(rows, size=2)}, registry=registry, held_out=[{"language": "zul"}])


@pytest.mark.parametrize("declared", [True, False])
def test_1500_datasets_mix_within_a_second(declared):
    features = [{"language": f"l{i % 50}", "task": f"t{i // 50}"} for i in range(1500)]
    if declared:
        sources = [(table(text=["x"] * 20), row) for row in features]
    else:
        sources = [table(text=["x"] * 20, **{k: [v] * 20 for k, v in row.items()}) for row in features]  # fmt: skip
    held = [{"language": "l3", "task": f"t{i}"} for i in range(10)]

    def once():
        began = time.perf_counter()
        made = Mixture(sources, held_out=held)
        assert len(made.cells) == 1490 and len(made.train) == 29800
        assert len(made.train[:64]) == 64
        return time.perf_counter() - began

    # 0.2 s on a quiet core; other processes on the machine only ever add time.
    stop = time.perf_counter() + 30
    assert any(once() < 1 for _ in iter(lambda: int(time.perf_counter() > stop), 1))
    began = time.perf_counter()
    epoch = Mixture(sources, held_out=held).epoch(0)
    assert len(epoch) == 29800 and {"language", "task"} < set(epoch.column_names)
    assert time.perf_counter() - began < 20  # 0.5 s


def test_sources_of_unlike_form_join_as_before():
    """Selections, other columns and other declarations go the slow way round, to the same rows."""
    first = table(text=["a", "b", "c"]).select([2, 0])
    second = table(text=["d"], extra=[1], task=["pos"])
    made = Mixture([(first, {"language": "hau", "task": "ner"}), (second, {"language": "swa"})])
    rows = {(row["text"], row["language"], row["task"], row["extra"]) for row in made.epoch(0)}
    assert rows == {("c", "hau", "ner", None), ("a", "hau", "ner", None), ("d", "swa", "pos", 1)}
    mixed = Mixture([(table(text=["a"]), {"language": "hau"}), (table(text=["b"]), {"language": ["hau", "swa"]})])  # fmt: skip
    with pytest.raises(MixtureError, match="a column has different types"):
        mixed.epoch(0)
    assert len(mixed.train) == 2
    # What the rows are read from is what select and filter left.
    chosen = table(text=list("abc"), language=["x", "y", "z"]).filter(lambda row: row["language"] != "y")  # fmt: skip
    assert {row["language"]: row["text"] for row in Mixture([chosen]).train} == {"x": "a", "z": "c"}
