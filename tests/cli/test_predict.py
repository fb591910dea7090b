"""``flix predict``, and ``flix evaluate --compose``: answers of an adapter's folder, under other combinations too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flix
from flix.cli.app import app
from tests.helpers.training import Write, ok, run

Trained = Callable[..., tuple[Path, Path]]


@pytest.fixture
def made(trained: Trained) -> tuple[Path, Path]:
    return trained("t5", training={"learning_rate": 0.02, "steps": 80}, evaluation={"limit": 3, "left_out": False})  # fmt: skip


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_in_mixed_batches_get_the_answers_of_an_evaluation(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path, adapter = made
    samples = ok("evaluate", path, adapter)["samples"]
    # Held-out cells come under the same rule; features are named by group, or as the training data named them.
    rows = []
    for number, sample in enumerate(samples):
        task, language = (part.partition("=")[2] for part in sample["cell"].split(","))
        column = "language" if number % 2 else "lang"
        rows.append({"id": number, "source": sample["source"], "target": sample["target"], "task": task, column: language})  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in.jsonl").write_text("\n" + text)
    result = run(app, ["predict", str(adapter), str(tmp_path / "in.jsonl"), "--batch-size", "4"])
    assert result.exit_code == 0, result.output
    found = lines(result.stdout)
    assert [{k: v for k, v in row.items() if k not in ("output", "right")} for row in found] == rows
    assert [row["output"] for row in found] == [sample["output"] for sample in samples]
    assert [row["right"] for row in found] == [sample["right"] for sample in samples]
    # From standard input to a file; without a target nothing is right or wrong.
    bare = [{k: v for k, v in row.items() if k != "target"} for row in rows]
    given = "".join(json.dumps(row) + "\n" for row in bare)
    result = run(app, ["predict", str(adapter), "-", "--output", str(tmp_path / "o.jsonl"), "--json"], input=given)  # fmt: skip
    assert json.loads(result.stdout) == {"output": str(tmp_path / "o.jsonl"), "rows": len(rows)}
    assert lines((tmp_path / "o.jsonl").read_text()) == [
        {k: v for k, v in row.items() if k not in ("target", "right")} for row in found
    ]


def test_features_of_all_rows_and_of_unknown_ones(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = made
    (tmp_path / "in.csv").write_text("source\nruwa\n")
    predict = ["predict", str(adapter), str(tmp_path / "in.csv"), "--features"]
    found = lines(run(app, [*predict, "language=hau,task=ner"]).stdout)
    assert found[0]["source"] == "ruwa" and "output" in found[0]
    (tmp_path / "new.jsonl").write_text('{"source": "ruwa", "task": "ner", "language": "zul"}')
    new = ["predict", str(adapter), str(tmp_path / "new.jsonl")]
    assert run(app, new).exit_code == 2
    assert run(app, [*new, "--unknown", "skip", "--max-new-tokens", "2", "--num-beams", "2"]).exit_code == 0  # fmt: skip


def test_nothing_in_nothing_out(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    result = run(app, ["predict", str(made[1]), str(tmp_path / "in.jsonl")])
    assert result.exit_code == 0 and result.stdout == ""


def test_mistakes_in_rows_and_options(made: tuple[Path, Path], tmp_path: Path, adapter: Path) -> None:  # fmt: skip
    _, mine = made

    def refused(row: str, *options: str, folder: Path = mine) -> str:
        (tmp_path / "in.jsonl").write_text(row)
        result = run(app, ["predict", str(folder), str(tmp_path / "in.jsonl"), *options])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        return str(result.stderr)

    whole = '{"source": "a", "task": "ner", "language": "hau"}'
    assert "in.jsonl:1: the row does not say its task; the tasks are: ner, pos, rev" in refused('{"source": "a"}')  # fmt: skip
    assert "no task 'nerr' (did you mean 'ner'?)" in refused(whole.replace("ner", "nerr"))
    assert "needs 'source' (did you mean 'sorce'?)" in refused(whole.replace("source", "sorce"))
    assert refused('{"source": "a", "task": "ner"}').endswith(
        "in.jsonl:1: the row does not name its language; its columns are: source, task. Name it (null for none), or say it for "
        "all rows: --features language=...\n"
    )
    said = refused(whole + "\n" + whole.replace("hau", "hua"))
    assert "in.jsonl:2: " in said and "'hua' (did you mean 'hau'?)" in said and "--unknown skip, or mean" in said  # fmt: skip
    assert "flix_" not in said
    for value in ("3", "[]", "{}", '{"hau": null}'):
        said = refused(whole.replace('"hau"', value))
        assert "in.jsonl:1: the language" in said and "--unknown" not in said
    assert "not valid JSON" in refused("{")
    assert "no file matches" in str(run(app, ["predict", str(mine), "none.jsonl"]).stderr)
    assert "cannot be a file" in refused(whole, "--output", str(tmp_path))
    assert "'hua'" in refused(whole, "--features", "language=hua")
    assert "unknown" in refused(whole, "--unknown", "perhaps")
    assert "holds no recipe.json" in refused(whole, folder=adapter)
    assert "no model folder" in refused(whole, "--base", "./nowhere")
    recipe = json.loads((mine / "recipe.json").read_text())
    (mine / "recipe.json").write_text(json.dumps({**recipe, "seen": None}))
    assert "recipe.json: not a recipe of an adapter: seen must be" in refused(whole)
    (mine / "recipe.json").write_text("{}")
    assert "not a recipe of an adapter" in refused(whole)


def test_rows_of_standard_input_are_named(made: tuple[Path, Path]) -> None:
    result = run(app, ["predict", str(made[1]), "-"], input="[1]\n")
    assert result.exit_code == 2 and "standard input:1: a row is a JSON object" in result.stderr


def held(result: dict[str, Any]) -> list[str]:
    return [sample["output"] for sample in result["samples"] if sample["cell"] == "task=rev,language=yor"]  # fmt: skip


def test_other_combinations_in_cells_never_trained(made: tuple[Path, Path], config: Write) -> None:
    path, adapter = made
    plain = ok("evaluate", path, adapter)
    seen = [s for s in plain["samples"] if s["cell"] != "task=rev,language=yor"]

    def other(*asked: str) -> dict[str, Any]:
        found: dict[str, Any] = ok("evaluate", path, adapter, *(x for a in asked for x in ("--compose", a)))  # fmt: skip
        assert [s for s in found["samples"] if s["cell"] != "task=rev,language=yor"] == seen
        # Whatever its rows activate, a cell is called as its data is.
        assert [(c["cell"], c["features"]) for c in found["cells"]] == [(c["cell"], c["features"]) for c in plain["cells"]]  # fmt: skip
        return found

    # Each is what a configuration, or rows, that say the same give.
    weights = config(evaluation={"unseen_group_weights": {"task": 0.0, "language": 0.0, "shared": -1.5}, "limit": 3})  # fmt: skip
    same = ok("evaluate", weights, adapter)
    config(evaluation={"limit": 3})
    assert held(other("task=off,language=off,shared=-1.5")) == held(other("task=off", "language=off", "shared=-1.5")) == held(same)  # fmt: skip
    assert held(same) != held(plain)
    rows = [{"source": s["source"], "task": "rev", "language": "swa"} for s in plain["samples"] if s["cell"].endswith("rev,language=yor")]  # fmt: skip
    given = "".join(json.dumps(row) + "\n" for row in rows)
    answered = lines(run(app, ["predict", str(adapter), "-"], input=given).stdout)
    assert held(other("language=parent:swa")) == [row["output"] for row in answered]
    found = other("language=searched")
    row = found["searched"]["task=rev,language=yor"]
    assert {*row["language"]} <= {"hau", "swa", "yor"} and row["task"] == {"rev": 1.0}
    # A row of three was searched on, and is not scored.
    assert [c["rows"] for c in found["cells"] if not c["seen"]] == [2] and len(held(found)) == 2
    text = run(app, ["evaluate", str(path), str(adapter), "--compose", "language=searched"]).stdout
    assert "searched for task=rev,language=yor: " in text and "1.00 task=rev" in text


def test_a_composition_that_is_asked_for_holds_under_any_factors(made: tuple[Path, Path], config: Write, tmp_path: Path) -> None:  # fmt: skip
    path, adapter = made
    config(evaluation={"limit": 3})
    plain = ok("evaluate", path, adapter)
    asked = ("task=-1.5,language=parent:swa", "language=parent:swa", "language=searched")
    wanted = [ok("evaluate", path, adapter, "--compose", how) for how in asked]
    config(evaluation={"unseen_group_weights": {"language": 0.0, "task": 0.0}, "limit": 3})
    without = ok("evaluate", path, adapter)
    for how, same in zip(asked, wanted, strict=True):
        found = ok("evaluate", path, adapter, "--compose", how)
        assert held(found) == held(same) and found.get("searched") == same.get("searched")
    # A row that states its own weights is answered with these, by evaluate and by predict.
    mine = shutil.copytree(adapter, tmp_path / "mine")
    recipe = json.loads((mine / "recipe.json").read_text())
    recipe["unseen_group_weights"] = {"language": 0.0, "task": 0.0}
    (mine / "recipe.json").write_text(json.dumps(recipe))
    sources = [s["source"] for s in plain["samples"] if s["cell"].endswith("rev,language=yor")]

    def predicted(language: object) -> list[str]:
        rows = [{"source": s, "task": "rev", "language": language} for s in sources]
        given = "".join(json.dumps(row) + "\n" for row in rows)
        return [row["output"] for row in lines(run(app, ["predict", str(mine), "-"], input=given).stdout)]  # fmt: skip

    assert held(plain) != held(without)
    assert predicted("yor") == held(without) and predicted({"yor": 1.0}) == held(plain)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("langage=off", "there is no group 'langage' (did you mean 'language'?)"),
        ("language=of", "language= must be off, a factor such as 0.5, parent:NAME or searched; got 'of'"),
        ("language=nan", "language= must be off"),
        ("language", "language= must be off"),
        ("language=off,language=searched", "'language' is given twice"),
        ("language=parent:hua", "has no 'hua' (did you mean 'hau'?)"),
        ("", "there is no group ''"),
    ],
)  # fmt: skip
def test_mistakes_in_compositions(adapter: Path, config: Write, asked: str, message: str) -> None:
    result = run(app, ["evaluate", str(config()), str(adapter), "--compose", asked])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_search_is_for_groups_that_rows_name(made: tuple[Path, Path]) -> None:
    path, adapter = made
    for how in ("searched", "parent:all"):
        result = run(app, ["evaluate", str(path), str(adapter), "--compose", f"shared={how}"])
        assert result.exit_code == 2 and "no row names the group 'shared'" in result.stderr


def test_the_library_predicts(made: tuple[Path, Path]) -> None:
    from flix.tasks.prediction import Predictor

    predictor = Predictor(made[1], features={"language": "hau", "task": "ner"})
    (found,) = predictor([("here", {"source": "ruwa"})])
    assert {*found} == {"source", "output"}
    # What a row says of an earlier answer is not said of this one.
    (again,) = predictor([("here", {"source": "ruwa", "output": "earlier", "right": True})])
    assert again == found
    # What its file says of a row counts as if the row said it.
    (other,) = predictor([("here", {"source": "ruwa", "language": "swa"})])
    assert list(predictor([("here", {"source": "ruwa"}, {"language": "swa"})])) == [
        {k: v for k, v in other.items() if k != "language"}
    ]
    with pytest.raises(flix.FlixError, match="there: column 'source' holds nothing"):
        list(predictor([("there", {"source": None})]))
