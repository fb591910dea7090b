"""Data sets of a configuration as a mixture: what is trained, what is held out, and what is said of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flix
from flix.cli.app import app
from flix.core.features.cells import MixtureError
from flix.data.display import trained_rows
from flix.training.errors import DataError
from tests.helpers.training import data_of, rows_of, run


def has(features: dict[str, Any], **wanted: str) -> bool:
    return all(features.get(group) == name for group, name in wanted.items())


def test_held_out_cells_are_for_evaluation_only(config: Callable[..., Path]) -> None:
    data = data_of(config())
    training, evaluation = rows_of(data)
    assert not any(has(row, language="yor", task="rev") for row in training)
    held = [row for row in evaluation if has(row, language="yor", task="rev")]
    assert len(held) == 12
    # Two of every seen cell are held back.
    assert len(training) == 8 * 10 and len(evaluation) == 8 * 2 + 12
    assert data.mixture.held_out_cells == ("task=rev,language=yor",)
    trained = {(row["source"], row["task"], row["language"]) for row in training}
    assert not trained & {(row["source"], row["task"], row["language"]) for row in evaluation}


def test_a_held_out_cell_may_name_some_groups_or_implied_features(
    config: Callable[..., Path],
) -> None:
    training, _ = rows_of(data_of(config(held_out=[{"language": "yor"}])))
    assert training and not any(row["language"] == "yor" for row in training)
    with pytest.raises(MixtureError, match="nothing is left to train on"):
        data_of(config(held_out=[{"shared": "all"}]))


def test_held_out_mistakes(config: Callable[..., Path]) -> None:
    with pytest.raises(MixtureError, match=r"held_out\[0\].*'hua'.*'hau'"):
        data_of(config(held_out=[{"language": "hua"}]))
    with pytest.raises(MixtureError, match=r"held_out\[0\] is empty"):
        data_of(config(held_out=[{}]))


def test_declared_registry_refuses_what_it_lacks(config: Callable[..., Path]) -> None:
    registry = {"task": ["ner", "pos", "rev"], "language": ["hau", "swa"], "shared": ["all"]}
    with pytest.raises(flix.FeatureError, match=r"source .*ner\.jsonl.*no feature 'yor'"):
        data_of(config(registry=registry, held_out=[]))
    # Under another rule they are trained on without it, and still make cells.
    data = data_of(config(registry=registry, held_out=[{"language": "yor"}], unknown="skip"))
    assert len(data.mixture.cells) == 6 and len(data.mixture.held_out_cells) == 3


def test_features_in_the_names_of_files(config: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("hau", "swa"):
        for half in ("train", "test"):
            line = json.dumps({"source": f"{name} {half}", "target": "t"})
            (tmp_path / f"{name}.{half}.jsonl").write_text(line)
    entry = {"files": "{language}.train.jsonl", "eval_files": "{language}.test.jsonl", "features": {"task": "ner"}}  # fmt: skip
    common = {"held_out": [], "implies": {}, "ranks": 1}
    data = data_of(config(datasets=[entry], **common))
    training, evaluation = rows_of(data)
    assert [(r["language"], r["source"]) for r in training] == [("hau", "hau train"), ("swa", "swa train")]  # fmt: skip
    assert [(r["language"], r["source"]) for r in evaluation] == [("hau", "hau test"), ("swa", "swa test")]  # fmt: skip
    assert data.groups == ("task", "language")
    with pytest.raises(DataError, match=r"'hau\.test\.jsonl' does not contain the language"):
        data_of(config(datasets=[{**entry, "eval_files": "hau.test.jsonl"}], **common))


def test_a_file_counts_once(config: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"source": name, "target": "t"}))
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "a.jsonl")
    common = {"held_out": [], "implies": {}, "ranks": 1}
    files = ["b.jsonl", "*.jsonl", f"../{tmp_path.name}/a.jsonl"]
    data = data_of(config(datasets=[{"files": files, "features": {"task": "x"}}], **common))
    assert [row["source"] for row in rows_of(data)[0]] == ["b", "a"]
    # A name that says something of the rows is read for each thing that it says.
    data = data_of(config(datasets=[{"files": "{language}.jsonl"}], **common))
    assert [row["language"] for row in rows_of(data)[0]] == ["a", "b", "c"]


def test_rows_that_are_trained_on_are_not_evaluated_on(config: Callable[..., Path], tmp_path: Path) -> None:  # fmt: skip
    rows = [{"l": name, "source": name, "target": "t"} for name in ("hau", "swa")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    common = {"implies": {}, "ranks": 1}
    column = {"feature_columns": {"language": "l"}}
    one = {"files": "a.jsonl", **column}
    here = f"../{tmp_path.name}/a.jsonl"

    def read(*datasets: dict[str, Any], held_out: Any = ()) -> Any:
        return data_of(config(datasets=[*datasets], held_out=[*held_out], **common))

    with pytest.raises(DataError, match=r"a\.jsonl is for evaluation, and is trained on, too \(lang"):  # fmt: skip
        read({**one, "eval_files": here})
    with pytest.raises(DataError, match="trained on, too, in the data set 'first'"):
        read({**one, "name": "first"}, {"files": "hub/train.jsonl", **column, "eval_files": here})
    stream = {"files": "a.jsonl", "features": {"language": "x"}, "stream": True, "rows": 2}
    with pytest.raises(DataError, match=r"trained on, too \(language=x\)"):
        read({**stream, "eval_files": "a.jsonl"})
    for split, other in (("train", "train"), ("train", "train[:1]"), ("train[:1]", "train")):
        with pytest.raises(DataError, match=r"hub \[train.*is for evaluation, and is trained on"):
            read({"hub": "hub", **column, "split": split, "eval_split": other})
    read({"hub": "hub", **column, "split": "train[:1]", "eval_split": "train[1:]"})
    # Another task, other columns, other features, or nothing of it in training.
    read({**one, "eval_rows": 0}, {**one, "files": "hub/train.jsonl", "source": "target", "target": "source", "eval_files": "a.jsonl"})  # fmt: skip
    other = {"files": "hub/train.jsonl", "features": {"language": "y"}, "eval_files": "a.jsonl"}
    read({"files": "a.jsonl", "features": {"language": "x"}}, other)
    held = [{"language": "hau"}, {"language": "swa"}]
    read({**one, "eval_files": "a.jsonl"}, {**other, "eval_files": None}, held_out=held)


def test_groups_that_some_data_sets_have(config: Callable[..., Path], data: Path) -> None:
    entry = {"files": str(data / "ner.jsonl"), "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    plain = {"files": str(data / "pos.jsonl"), "features": {"task": "pos"}}
    found = data_of(config(datasets=[entry, plain], held_out=[], implies={}, ranks=1))
    assert found.mixture.cells[-1] == "task=pos" and found.mixture.sizes["task=pos"] == 36


def test_what_tasks_rows_are_of(config: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    rows = [{"t": task, "source": "a", "target": "b"} for task in ("x", "y", "x")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"held_out": [], "implies": {}, "ranks": 1}
    several = {"files": "d.jsonl", "feature_columns": {"task": "t"}}
    found = data_of(config(datasets=[several, {**several, "name": "again"}], **common))
    assert [spec.name for spec in found.specs] == ["x", "y"]
    assert [row["flix_task"] for row in rows_of(found)[0]] == [0, 1, 0] * 2
    # Without the group, a task is called as its data set; another prompt is another task.
    none = {"files": "d.jsonl", "feature_columns": {"language": "t"}, "name": "mine"}
    found = data_of(config(datasets=[none, {**none, "name": "other", "prompt": "{source}!"}], **common))  # fmt: skip
    assert [spec.name for spec in found.specs] == ["mine", "other"]
    labelled = {**several, "kind": "classification", "feature_columns": {"language": "t"}, "name": "c"}  # fmt: skip
    (spec,) = data_of(config(datasets=[labelled], **common)).specs
    assert (spec.name, spec.kind, spec.labels) == ("c", "classification", ("b",))
    with pytest.raises(DataError, match=r"holds 'b', which labels: does not name; it names: a, c"):
        data_of(config(datasets=[{**labelled, "labels": ["a", "c"]}], **common))


def test_what_is_drawn(config: Callable[..., Path], tmp_path: Path) -> None:
    lines = [{"l": "a"}] * 900 + [{"l": "b"}] * 100
    text = "".join(json.dumps({**r, "source": str(i), "target": "t"}) + "\n" for i, r in enumerate(lines))  # fmt: skip
    (tmp_path / "d.jsonl").write_text(text, encoding="utf-8")
    entry = {"files": "d.jsonl", "feature_columns": {"language": "l"}}
    for temperature, cap in ((1.0, None), (2.0, None), (5.0, None), (1.0, 300), (1.0, {"language": {"a": 100}})):  # fmt: skip
        path = config(
            datasets=[entry], held_out=[], implies={}, ranks=1, temperature=temperature, cap=cap
        )
        mixture = data_of(path).mixture
        size = {None: 9, 300: 3}.get(cap if not isinstance(cap, dict) else -1, 1)
        wanted = size ** (1 / temperature) / (1 + size ** (1 / temperature))
        drawn = mixture.drawn(40_000)
        assert sum(drawn.values()) == 40_000
        assert abs(drawn["language=a"] / 40_000 - wanted) < 0.01
    rows = mixture.run(3000)
    assert len(rows) == 3000
    # A function of seed and position: the length of a run changes no row of it.
    assert [r["source"] for r in mixture.run(9000)[700:900]] == [r["source"] for r in rows[700:900]]
    counts = {name: sum(row["language"] == name[-1] for row in rows) for name in mixture.cells}
    assert counts == mixture.drawn(3000)


def test_a_run_shows_all_rows_of_a_cell_before_any_again(config: Callable[..., Path]) -> None:
    mixture = data_of(config()).mixture
    rows = mixture.run(333)[:333]
    by_cell: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        by_cell.setdefault((row["task"], row["language"]), []).append(row["source"])
    assert len(by_cell) == 8
    for sources in by_cell.values():
        counts = np.array([sources.count(source) for source in {*sources}])
        assert counts.max() - counts.min() <= 1 and len(counts) == 10


def test_registry_and_sizes(config: Callable[..., Path]) -> None:
    data = data_of(config())
    assert data.mixture.registry().groups == ("task", "language", "shared")
    sizes = data.mixture.feature_sizes()
    assert sizes["shared", "all"] == 80 and sizes["task", "rev"] == 20
    assert {"task": ["rev"], "language": ["yor"]} not in trained_rows(data.mixture)
    assert len(trained_rows(data.mixture)) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "nope.jsonl"}, "no file matches"),
        ({"source": "sorce"}, "no column 'sorce' (did you mean 'source'?)"),
        ({"feature_columns": {"language": "language"}}, "no column 'language'"),
        ({"prompt": "{txt}"}, "needs 'txt'"),
        ({"eval_rows": 100}, "too few"),
        ({"features": {"flix_task": "a"}}, "'flix_task' is a name of flix's own columns"),
        ({"feature_columns": {"input_ids": "lang"}}, "'input_ids' is a name of flix's own"),
        ({"features": {"labels": "a"}}, "give the group another one"),
        ({"files": "{attention_mask}.jsonl"}, "'attention_mask' is a name of flix's own"),
        ({"source": "flix_activates"}, "rename the column of the rows"),
    ],
)
def test_data_mistakes(
    config: Callable[..., Path], data: Path, change: dict[str, Any], message: str
) -> None:
    dataset = {
        "files": str(data / "ner.jsonl"),
        "features": {"task": "ner"},
        "feature_columns": {"language": "lang"},
        **change,
    }
    with pytest.raises(flix.FlixError) as caught:
        data_of(config(datasets=[dataset], held_out=[]))
    assert message in str(caught.value)


def test_hub_datasets_through_a_local_folder(
    config: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets").disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hubset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((data / "ner.jsonl").read_bytes())
    (folder / "test.jsonl").write_bytes((data / "pos.jsonl").read_bytes())
    entry = {
        "hub": "hubset",
        "features": {"task": "ner"},
        "feature_columns": {"language": "lang"},
        "eval_split": "test",
    }
    training, evaluation = rows_of(data_of(config(datasets=[entry], held_out=[])))
    assert len(training) == 36 and len(evaluation) == 36
    with pytest.raises(DataError, match="cannot be loaded"):
        data_of(config(datasets=[{**entry, "split": "none"}], held_out=[]))


ROWS = [{"lang": "no", "source": "a é", "target": "01"}, {"lang": "NA", "source": "x, y", "target": "b"}]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = b'lang,source,target\nno,a \xc3\xa9,01\nNA,"x, y",b\n'


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_run_reads_norwegian_and_namibia(config: Callable[..., Path], tmp_path: Path, form: str) -> None:  # fmt: skip
    (tmp_path / f"rows.{form}").write_bytes(LINES if form == "jsonl" else TABLE)
    dataset = {"files": f"rows.{form}", "features": {"task": "up"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    path = config(datasets=[dataset], held_out=[], implies={}, ranks=2)
    found = data_of(path)
    assert found.mixture.registry().names("language") == ("no", "NA")
    assert [row["target"] for row in rows_of(found)[0]] == ["01", "b"]
    assert run(app, ["plan", str(path)]).exit_code == 0


NFC, NFD = "español", "espan\u0303ol"


@pytest.mark.parametrize("held", [NFC, NFD, f"language={NFD},task=ner"])
def test_rows_of_either_form_are_held_out(config: Callable[..., Path], tmp_path: Path, held: str) -> None:  # fmt: skip
    rows = [{"lang": name, "source": "a", "target": "b"} for name in (NFC, NFD, "yor", "eng+hin")]
    rows.append({"lang": ["eng", "hin"], "source": "a", "target": "b"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    dataset = {"files": "rows.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    entry = held if "=" in held else {"language": held}
    found = data_of(config(datasets=[dataset], held_out=[entry], implies={}, ranks=1))
    training, evaluation = rows_of(found)
    assert [row["language"] for row in training] == [["yor"], ["eng+hin"], ["eng", "hin"]]
    assert found.mixture.registry().names("language") == (NFC, "yor", "eng+hin", "eng", "hin")
    # Two cells that print alike are two.
    assert set(found.mixture.cells) == {"task=ner,language=yor", 'task=ner,language="eng+hin"', "task=ner,language=eng+hin"}  # fmt: skip
    assert sum(found.mixture.sizes.values()) == 3 and len(evaluation) == 2


@pytest.mark.filterwarnings("default:group 'language':UserWarning")
def test_names_that_are_almost_one_get_a_warning(config: Callable[..., Path], tmp_path: Path) -> None:  # fmt: skip
    rows = [{"lang": name, "source": "a", "target": "b"} for name in ("eng", "Eng")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"files": "rows.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    path = config(datasets=[dataset], held_out=[], implies={}, ranks=1)
    result = run(app, ["plan", str(path)])
    assert result.exit_code == 0 and "flix: warning: group 'language': 'eng' and 'Eng'" in result.stderr  # fmt: skip
    with pytest.raises(flix.FlixError, match="blank"):
        data_of(config(datasets=[{**dataset, "features": {"task": "ner "}}], held_out=[], implies={}, ranks=1))  # fmt: skip


def test_numbers_are_text_whatever_their_size(config: Callable[..., Path], tmp_path: Path) -> None:
    huge = -(10**400)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"source": huge, "target": 1.5, "lang": "eng"}))
    dataset = {"files": "rows.jsonl", "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    (row,) = rows_of(data_of(config(datasets=[dataset], held_out=[], implies={}, ranks=1)))[0]
    assert (row["source"], row["target"]) == (str(huge), "1.5")
    (tmp_path / "rows.jsonl").write_text('{"source": NaN, "target": "a", "lang": "eng"}')
    with pytest.raises(DataError, match="NaN is no JSON"):
        data_of(config(datasets=[dataset], held_out=[], implies={}, ranks=1))


def test_the_best_adapter_is_chosen_by_what_evaluations_tell(config: Callable[..., Path], data: Path) -> None:  # fmt: skip
    from flix.training.reading import read_settings
    from flix.training.run import prepare

    def refused(best: str, datasets: Any = None, **changes: Any) -> str:
        training = {"best": best, "eval_every": 1}
        more = {} if datasets is None else {"datasets": datasets}
        with pytest.raises(DataError) as found:
            prepare(read_settings(config(training=training, **more, **changes)))
        return str(found.value)

    assert "best: held_out.loss needs evaluation rows of held-out" in refused("held_out.loss", held_out=[])  # fmt: skip
    assert "all 18 are of the others" in refused("held_out.score", held_out=[])
    entry = {"files": str(data / "ner.jsonl"), "features": {"task": "ner"}, "feature_columns": {"language": "lang"}}  # fmt: skip
    alone = {"datasets": [entry], "ranks": 1}
    for best in ("loss", "score", "seen.loss"):
        assert "and there are none" in refused(best, held_out=[], **alone)
    held = [{"language": "yor"}]
    assert "best: seen.score needs evaluation rows of seen" in refused("seen.score", held_out=held, **alone)  # fmt: skip
    prepare(read_settings(config(training={"best": "loss", "eval_every": 1}, held_out=held, **alone)))  # fmt: skip
