"""Files and hubs as datasets of checked rows: what is kept, and what is said of rows that are wrong."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flix.data import Mixture
from flix.data.errors import DataError
from flix.data.files import find_files
from flix.data.loading import Reading, load_files, load_hub, with_features
from tests.helpers.data import datasets

ROWS: list[dict[str, Any]] = [
    {"lang": "hau", "source": "a", "n": "3", "words": ["x", "y"], "chat": [{"role": "user", "content": "hi"}]},
    {"lang": ["hau", "swa"], "source": -(10**400), "n": 0.5, "words": [], "chat": [{"role": "r", "content": "c"}]},
    {"lang": "swa", "source": 1.5, "n": 2, "words": ["z"], "chat": [{"role": "a", "content": "b", "more": 1}]},
]  # fmt: skip
COLUMNS = {"source": "text", "n": "number", "words": "texts", "chat": "messages"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def reading(columns: dict[str, str], **more: Any) -> Reading:
    return Reading(columns, {"task": "ner"}, {"language": "lang"}, **more)


def load(folder: Path, how: Reading, pattern: str = "rows.jsonl") -> Any:
    return with_features(load_files(find_files(pattern, folder), how))


def test_columns_have_their_forms(tmp_path: Path) -> None:
    written(tmp_path, ROWS)
    found, groups = load(tmp_path, reading(COLUMNS))
    assert groups == ("task", "language") and found.column_names == [*COLUMNS, "task", "language"]
    assert found["source"][:] == ["a", str(-(10**400)), "1.5"] and found["n"][:] == [3.0, 0.5, 2.0]
    assert found["words"][:] == [["x", "y"], [], ["z"]]
    assert found["chat"][2] == [{"role": "a", "content": "b"}]
    assert found["language"][:] == [["hau"], ["hau", "swa"], ["swa"]]
    shown, _ = load(tmp_path, reading({"words": "shown", "source": "shown"}, limit=1))
    assert shown["words"][:] == ["['x', 'y']"] and len(shown) == 1


def test_weights_and_names_in_one_column(tmp_path: Path) -> None:
    written(tmp_path, [{"lang": "hau"}, {"lang": {"hau": 0.25, "swa": 0.75}}, {"lang": "swa"}])
    found, _ = load(tmp_path, reading({}))
    mixture = Mixture(found)
    assert mixture.sizes == dict.fromkeys(
        ("language=hau,task=ner", "language=hau+swa,task=ner", "language=swa,task=ner"), 1
    )
    rows = [{k: v for k, v in row["language"].items() if v} for row in mixture.train]
    assert sorted(map(str, rows)) == ["{'hau': 0.25, 'swa': 0.75}", "{'hau': 1.0}", "{'swa': 1.0}"]


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from flix.data import loading

    read = []
    plain = loading.read_file
    monkeypatch.setattr(loading, "read_file", lambda path: read.append(path.name) or plain(path))
    file = written(tmp_path, ROWS)
    first, _ = load(tmp_path, reading({"source": "text"}))
    again, _ = load(tmp_path, reading({"source": "text"}))
    assert read == ["rows.jsonl"] and first[:] == again[:]
    time = file.stat().st_mtime_ns
    text = file.read_text().replace('"a"', '"b"')
    file.write_text(text)
    os.utime(file, ns=(time, time))  # the same size and time: the bytes tell
    changed, _ = load(tmp_path, reading({"source": "text"}))
    assert changed["source"][0] == "b" and len(read) == 2
    load(tmp_path, reading({"source": "shown"}))
    assert len(read) == 3


@pytest.mark.parametrize("what", ["*.arrow", "dataset_info.json"])
def test_a_damaged_cache_is_read_anew(tmp_path: Path, cache: Path, what: str) -> None:
    written(tmp_path, ROWS)
    wanted = load(tmp_path, reading({"source": "text"}))[0][:]
    (first,) = cache.rglob(what)
    for content in (b"", b"junk"):
        first.write_bytes(content)
        assert load(tmp_path, reading({"source": "text"}))[0][:] == wanted
    for file in cache.rglob(what):
        file.write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot be kept in the cache of datasets, .*cache'.*damaged"):  # fmt: skip
        load(tmp_path, reading({"source": "text"}))


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_disk_without_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:  # fmt: skip
    import errno

    from datasets.exceptions import DatasetGenerationError

    def full(*_: Any, **__: Any) -> Any:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not wrapped:
            raise error
        raise DatasetGenerationError("An error occurred") from error

    written(tmp_path, ROWS)
    monkeypatch.setattr("datasets.Dataset.from_generator", full)
    with pytest.raises(DataError, match="No space left on device; give it room") as found:
        load(tmp_path, reading({"source": "text"}))
    assert "\n" not in str(found.value)


def test_files_of_several_names_and_endings(tmp_path: Path) -> None:
    written(tmp_path, [{"source": "a"}], "hau.train.jsonl")
    (tmp_path / "swa.train.csv").write_text("source\nNA\n01\n")
    (tmp_path / "yor.train.jsonl.gz").write_bytes(gzip.compress(b'{"source": "\xc3\xa9"}'))
    found, groups = load(tmp_path, Reading({"source": "text"}, {"task": "ner"}, {}), "{language}.train.*")  # fmt: skip
    assert groups == ("task", "language")
    assert list(zip(found["language"], found["source"], strict=True)) == [
        ("hau", "a"), ("swa", "NA"), ("swa", "01"), ("yor", "é"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "a"}, "rows.jsonl:4: no column 'lang'; it has: source"),
        ({"lang": "hau", "sorce": "a"}, "no column 'source' (did you mean 'sorce'?)"),
        ({"lang": "hau", "source": None}, "rows.jsonl:4: column 'source' must hold text"),
        ({"lang": "hau", "source": "\ud800"}, "half of a surrogate pair"),
        ({"lang": 3, "source": "a"}, "rows.jsonl:4: the language must be a name"),
        ({"lang": "hau ", "source": "a"}, "rows.jsonl:4: "),
        ({"lang": "hau", "source": "a", "n": "x"}, "column 'n' must hold a finite number, got 'x'"),
        ({"lang": "hau", "source": "a", "n": True}, "column 'n' must hold a finite number"),
        ({"lang": "hau", "source": "a", "n": 1, "words": "x"}, "'words' must hold a list of texts"),
        ({"lang": "hau", "source": "a", "n": 1, "words": [[]]}, "'words' must hold text"),
        ({"lang": "hau", "source": "a", "n": 1, "words": [], "chat": ["a"]}, "message 0 must be"),
    ],
)  # fmt: skip
def test_rows_that_are_wrong_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    written(tmp_path, [*ROWS, row])
    for _ in range(2):  # a failure is not kept
        with pytest.raises(DataError) as caught:
            load(tmp_path, reading(COLUMNS))
        assert message in str(caught.value)


def test_a_prompt_does_not_say_nothing(tmp_path: Path) -> None:
    written(tmp_path, [{"lang": "hau", "topic": None}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'topic' holds nothing"):
        load(tmp_path, reading({"topic": "shown"}))
    with pytest.raises(DataError, match=r"the prompt needs 'tpic' \(did you mean 'topic'\?\); there is: lang, topic, task, language"):  # fmt: skip
        load(tmp_path, reading({"tpic": "shown"}))


def test_no_rows(tmp_path: Path) -> None:
    written(tmp_path, [])
    assert len(load(tmp_path, reading(COLUMNS))[0]) == 0


def test_a_folder_as_a_hub(tmp_path: Path) -> None:
    folder = tmp_path / "hubset"
    folder.mkdir()
    written(folder, [{"lang": "hau", "source": 1, "n": 1.5}, {"lang": "swa", "source": 2, "n": 2}], "train.jsonl")  # fmt: skip
    how = reading({"source": "text", "n": "number"})
    found, _ = with_features(load_hub(str(folder), None, "train", how)[0])
    assert found["source"][:] == ["1", "2"] and found["language"][:] == ["hau", "swa"]
    with pytest.raises(DataError, match="cannot be loaded"):
        load_hub(str(folder), None, "none", how)
    with pytest.raises(DataError, match=r"hubset \[train\] row 0: no column 'target'"):
        load_hub(str(folder), None, "train", reading({"target": "text"}))


def test_rows_held_back_and_rows_of_evaluation() -> None:
    def rows(language: str, first: int, count: int) -> Any:
        texts = [f"{language}{i}" for i in range(first, first + count)]
        return datasets.Dataset.from_dict({"text": texts, "language": [language] * count})

    def made(seed: int = 0, **more: Any) -> Mixture:
        from flix.data import Source

        sources = [Source(rows(name, 0, 10), {"task": "ner"}, eval_rows=3) for name in ("hau", "swa", "yor")]  # fmt: skip
        extra = [(rows("hau", 90, 2), {"task": "ner"}), (rows("ibo", 90, 2), {"task": "ner"})]
        return Mixture(sources, evaluation=extra, seed=seed, held_out=[{"language": "yor"}], **more)

    mixture = made()
    cell = "language={},task=ner".format
    assert mixture.sizes == {cell("hau"): 7, cell("swa"): 7} == mixture.counted
    assert mixture.held_out_cells == (cell("yor"), cell("ibo"))
    assert len(mixture.held_out) == 10
    found = mixture.evaluation_rows()
    texts: dict[str, set[str]] = {}
    for number in range(len(found)):
        texts.setdefault(found.names[found.cells[number]], set()).add(found[number]["text"])
    assert texts[cell("yor")] == {f"yor{i}" for i in range(10)}
    assert texts[cell("ibo")] == {"ibo90", "ibo91"}
    assert len(texts[cell("hau")]) == 5 and len(texts[cell("swa")]) == 3
    assert dict(zip(found.names, found.seen.tolist(), strict=True)) == {
        cell("hau"): True, cell("swa"): True, cell("yor"): False, cell("ibo"): False,
    }  # fmt: skip
    trained = {row["text"] for epoch in range(3) for row in mixture.train if not mixture.train.set_epoch(epoch)}  # fmt: skip
    assert trained == {f"{n}{i}" for n in ("hau", "swa") for i in range(10)} - texts[cell("hau")] - texts[cell("swa")]  # fmt: skip
    assert {row["text"] for row in mixture.stream()} == trained
    few = found.limited(2)
    assert len(few) == 8 and [row["text"][:3] for row in few.__getitems__([0, 1])] == ["hau", "hau"]
    # Drawn by the seed and the cell, whatever sources are called.
    renamed = Mixture(
        [replace(source, name=f"other {source.name}") for source in mixture.sources],
        evaluation={
            "b": (rows("hau", 90, 2), {"task": "ner"}),
            "c": (rows("ibo", 90, 2), {"task": "ner"}),
        },
        held_out=[{"language": "yor"}],
    )
    assert [r["text"] for r in renamed.evaluation_rows()] == [r["text"] for r in found]
    again, other = made().evaluation_rows(), made(seed=1).evaluation_rows()
    assert [r["text"] for r in again] == [r["text"] for r in found] != [r["text"] for r in other]


def test_a_held_out_cell_that_evaluation_covers_keeps_its_training_rows_out() -> None:
    both = [datasets.Dataset.from_dict({"text": [t], "language": ["yor"], "task": ["ner"]}) for t in "ab"]  # fmt: skip
    other = datasets.Dataset.from_dict({"text": ["c"], "language": ["hau"], "task": ["ner"]})
    mixture = Mixture([both[0], other], evaluation=[both[1]], held_out=[{"language": "yor"}])
    assert [row["text"] for row in mixture.evaluation_rows()] == ["b"]


def test_implications_without_a_registry() -> None:
    from flix.data import MixtureError

    rows = datasets.Dataset.from_dict({"text": list("ab"), "language": ["hau", "yor"]})
    implies = {("language", "yor"): [("family", "benue")], ("language", "*"): [("shared", "all")]}
    mixture = Mixture(rows, implies=implies, held_out=[{"family": "benue"}])
    assert mixture.cells == ("language=hau",) and mixture.registry().groups == ("language", "family", "shared")  # fmt: skip
    assert mixture.feature_sizes()["shared", "all"] == 1
    with pytest.raises(MixtureError, match=r"held_out\[0\].*'benu'"):
        Mixture(rows, implies=implies, held_out=[{"family": "benu"}])
    with pytest.raises(MixtureError, match="not both"):
        Mixture(rows, implies=implies, registry=mixture.registry())


@pytest.mark.parametrize(
    ("count", "message"),
    [(2, "language=hau has 2 rows, too few to hold back eval_rows=2"), (True, "eval_rows"), (-1, "eval_rows")],
)  # fmt: skip
def test_rows_that_cannot_be_held_back(count: Any, message: str) -> None:
    from flix.data import MixtureError, Source

    rows = datasets.Dataset.from_dict({"text": list("ab"), "language": ["hau", "hau"]})
    with pytest.raises(MixtureError) as caught:
        Mixture([Source(rows, eval_rows=count)])
    assert message in str(caught.value)
    with pytest.raises(MixtureError, match="streamed: rows cannot be held back"):
        Mixture([Source(rows.to_iterable_dataset(), size=2, eval_rows=1)])
    with pytest.raises(MixtureError, match="for evaluation and streamed"):
        Mixture(rows, evaluation=[(rows.to_iterable_dataset(), {})] if count == 2 else rows.to_iterable_dataset())  # fmt: skip
