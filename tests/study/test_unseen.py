"""Languages never trained on, served in all ways by tiny runs; and runs on official test sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flix.study.evidence import EvidenceError, read_scores
from flix.study.official import main as official_main
from flix.study.official import official, spaced
from flix.study.unseen import Served, main, serve
from flix.training import read_settings, train
from tests.helpers.training import config, data, models, one_thread  # noqa: F401
from tests.study import made

PARENTS = {"hau": "west", "yor": "west", "swa": "east"}
HELD_OUT = [{"language": "yor"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], data: Path) -> Path:  # noqa: F811
    """A study's folder with a run of features and one of a LoRA, which never saw one language."""
    root = tmp_path_factory.mktemp("study")
    said = made.scores({"flix": (0.5, 0.5), "lora": (0.5, 0.5)}, seeds=[0], claims=[])
    made.write(root, said)
    for arm, ranks in (("flix", {"language": 1, "task": 2, "shared": 2}), ("lora", {"language": 0, "task": 0, "shared": 4})):  # fmt: skip
        datasets = [
            {
                "files": str(data / f"{task}.jsonl"), "features": {"task": task}, "eval_rows": 2,
                "feature_columns": {"language": "lang"}, "prompt": "{task}: {source}",
            }
            for task in ("ner", "pos")
        ]  # fmt: skip
        settings = {
            "model": str(models["t5"]), "kind": "seq2seq", "output": str(root / "runs" / f"{arm}-0"), "datasets": datasets,
            "held_out": HELD_OUT, "implies": {"task=*": "shared=all"}, "ranks": {"rule": "by_group", **ranks}, "seed": 3,
            "training": {"steps": 20, "batch_size": 4, "learning_rate": 0.02, "threads": 1},
            "evaluation": {"max_new_tokens": 3, "limit": 10, "left_out": False},
        }  # fmt: skip
        file = root / f"{arm}.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        train(read_settings(file))
    return root


def test_all_ways_answer_the_same_rows_and_none_that_were_searched_on(folder: Path) -> None:
    file = serve(folder, rows=4, parents=PARENTS)
    study = read_scores(file)
    assert list(study.planned) == ["flix, skip", "flix, mean", "flix, parent", "flix, searched", "lora, as it is"]  # fmt: skip
    assert study.lacking(list(study.planned)) == []
    assert study.made["relatives"] == {"yor": ["hau"]}
    for arm in study.whole():
        cells = arm.runs[0].cells
        assert sorted(cells) == ["task=ner,language=yor", "task=pos,language=yor"]
        for cell in cells.values():
            assert (cell.group, cell.trained, cell.rows) == ("last_word", 0, 6)  # of 10, less 4
            assert cell.right is not None and cell.score == pytest.approx(100 * cell.right.mean(), abs=0.01)  # fmt: skip


def activated(served: Served) -> dict[str, set[tuple[Any, ...]]]:
    """What the rows say of their language in each way, as the evaluator is given it."""
    seen: set[tuple[Any, ...]] = set()

    def spy(of: Any) -> Any:
        for row, cell in zip(served.rows, served.evaluator.cells.tolist(), strict=True):
            said = of(row, cell)["language"]
            seen.add(tuple(sorted(said.items())) if said else ())

    served.answered = spy  # type: ignore[method-assign]
    found = {}
    for name, _ in served.ways(PARENTS):
        found[name] = set(seen)
        seen.clear()
    return found


def test_ways_activate_what_they_say(folder: Path) -> None:
    found = activated(Served(folder / "runs" / "flix-0", rows=4))
    assert found["skip"] == {()}
    assert found["mean"] == {(("hau", 0.5), ("swa", 0.5))}
    assert found["parent"] == {(("hau", 1.0),)}
    assert found["searched"] and all(name in ("hau", "swa") for row in found["searched"] for name, _ in row)  # fmt: skip
    assert list(activated(Served(folder / "runs" / "lora-0", rows=4)).values()) == [{()}]


def test_a_language_without_relatives_is_served_without_a_feature(folder: Path) -> None:
    served = Served(folder / "runs" / "flix-0", rows=4)
    assert served.relatives({"yor": "alone", "hau": "west"}) == {"yor": []}
    ways = dict(served.ways({}))
    for name, cell in ways["parent"].items():
        assert cell["right"] == ways["skip"][name]["right"]


def test_weights_are_the_rows_own_and_answers_differ_where_features_do(folder: Path) -> None:
    """With a weight of 100 on a language, answers are others: what the rows say reaches the model."""
    served = Served(folder / "runs" / "flix-0", rows=4)
    served.answered(lambda row, cell: {"language": None})
    plain = served.evaluator.collator.routing_of(served.evaluator.rows)
    served.answered(lambda row, cell: {"language": {"hau": 100.0}})
    heavy = served.evaluator.elsewhere.routing_of(served.evaluator.rows)
    assert plain.weights.max() == 1.0 and heavy.weights.max() == 100.0
    assert (np.sort(heavy.ids)[:, -1] >= 0).all()


def test_what_was_served_is_kept_until_it_is_asked_otherwise(folder: Path) -> None:
    told: list[str] = []
    file = serve(folder, rows=4, parents=PARENTS, progress=told.append)
    before = file.read_bytes()
    told.clear()
    assert serve(folder, rows=4, parents=PARENTS, progress=told.append).read_bytes() == before
    assert told == []
    with open(folder / "runs" / "lora-0" / "metrics.json", "a") as metrics:
        metrics.write("\n")  # as of a run that was repeated
    serve(folder, rows=4, parents=PARENTS, progress=told.append)
    assert told == ["lora, seed 0"] and json.loads(file.read_bytes())["arms"] == json.loads(before)["arms"]  # fmt: skip
    told.clear()
    serve(folder, arms=["lora"], rows=5, parents=PARENTS, progress=told.append)
    assert told == ["lora, seed 0"] and list(read_scores(file).planned) == ["lora, as it is"]


def test_studies_that_cannot_be_served_are_refused(folder: Path, tmp_path: Path, capsys: Any, config: Any) -> None:  # noqa: F811  # fmt: skip
    assert main([str(tmp_path)]) == 2
    assert "holds no scores.json; run flix study first" in capsys.readouterr().err
    with pytest.raises(EvidenceError, match="no arm 'flux'"):
        serve(folder, arms=["flux"])
    train(read_settings(config("t5", training={"steps": 2})))
    with pytest.raises(EvidenceError, match="no row of a language that it was never trained on"):
        Served(tmp_path / "run")


def words(root: Path) -> Path:
    """The study's data as far as official test sets need it."""
    cells = [{"cell": "segment/hau", "train": 24}, {"cell": "segment/yor", "train": 0}]
    folder = root / "words"
    (folder / "official" / "segment").mkdir(parents=True)
    (folder / "fingerprint.json").write_text(json.dumps({"cells": cells}))
    for language in ("hau", "yor", "zul"):
        rows = [
            {"language": language, "task": "segment", "source": f"ruwa {i}", "target": f"a|b{i}", "trained_on": i < 2}
            for i in range(5)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / "official" / "segment" / f"{language}.test.jsonl.gz").write_bytes(gzip.compress(text))  # fmt: skip
    return folder


def test_official_rows_are_answered_and_counted(tmp_path: Path, models: dict[str, Path], capsys: Any) -> None:  # noqa: F811  # fmt: skip
    source = tmp_path / "segment.jsonl"
    lines = [{"language": lang, "source": f"ruwa {i}", "target": "a|b"} for lang in ("hau", "yor") for i in range(8)]  # fmt: skip
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "model": str(models["t5"]), "kind": "seq2seq", "output": str(tmp_path / "run"),
        "datasets": [{"files": str(source), "features": {"task": "segment"}, "feature_columns": {"language": "language"}}],
        "ranks": 2, "training": {"steps": 1, "batch_size": 4, "threads": 1}, "evaluation": {"max_new_tokens": 5},
    }  # fmt: skip
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(settings))
    train(read_settings(tmp_path / "t.yaml"))
    folder = words(tmp_path)
    found = official([tmp_path / "run"], folder, tasks=["segment"], limit=4)
    entries = found["tasks"]["segment"]
    assert sorted(entries) == ["hau", "yor"]  # zul has no feature
    assert (entries["hau"]["rows"], entries["hau"]["rows_new"], entries["hau"]["trained"]) == (
        4,
        2,
        24,
    )
    assert set(entries["hau"]["runs"][0]) == {"run", "exact", "exact_new", "f1"}
    assert found["limit"] == 4
    out = tmp_path / "out"
    assert official_main([str(tmp_path / "run"), "--words", str(folder), "--task", "segment", "--out", str(out)]) == 0  # fmt: skip
    assert json.loads((out / "official.json").read_text())["tasks"]["segment"]["yor"]["rows"] == 5
    assert official_main([str(tmp_path / "run"), "--words", str(folder), "--task", "inflect"]) == 2
    assert "holds no test set of inflect" in capsys.readouterr().err


def test_fewer_official_rows_are_evenly_spaced() -> None:
    lines = [str(i) for i in range(10)]
    assert spaced(lines, 4) == ["0", "2", "5", "7"]
    assert spaced(lines, None) == spaced(lines, 10) == spaced(lines, 99) == lines
