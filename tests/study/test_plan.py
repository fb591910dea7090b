"""What a study's configuration comes to, and what is refused before anything is trained."""

from __future__ import annotations

import pytest
import yaml

pytest.importorskip("datasets")
pytest.importorskip("pydantic")
from typer.testing import CliRunner

from flix import Adapter, save_adapter
from flix.cli.app import app
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.changes import fresh_pairs
from flix.core.errors import FlixError, SettingsError
from flix.study.choosing import best, best_weights, edges, means
from flix.study.counting import Counting
from flix.study.plan import CHOOSING, LAST, Plan, choice_name, named
from flix.study.reading import read_study
from flix.study.summary import rows
from flix.training.data import read_data
from flix.training.models import build_config
from tests.helpers.training import one_thread
from tests.study.toys import make_data, write_study

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    make_data(folder, folder / "model")
    return folder


@pytest.fixture
def plan(tmp_path, toys):
    def make(**changes):
        return Plan(read_study(write_study(tmp_path, toys, **changes)), Counting())

    return make


def arm(**settings):
    return {"flix": {"title": "FLix"}, "other": settings}


def test_loras_have_the_ranks_that_they_are_equal_to(plan):
    made = plan()
    made.check()
    flix, compute, parameters = (made.counted(name, LAST) for name in made.arms)
    assert (flix.active, flix.total) == (1 + 2 + 3, 3 * 1 + 3 * 2 + 3)
    assert compute.by_group == {"lora": 6} and compute.active == compute.total == 6
    assert parameters.by_group == {"lora": 12}
    settings = made.run("lora-compute", LAST, 0, {"training.learning_rate": "0.02"}).settings
    assert settings.feature_dropout is None
    assert settings.evaluation.unseen_group_weights == {}
    assert settings.training.learning_rate == 0.02


def test_a_lora_keeps_the_feature_dropout_and_weights_of_its_own_settings(plan):
    own = {
        "feature_dropout": {"per_group": {"task": 0.1}},
        "evaluation": {"unseen_group_weights": {"task": 0.5}},
    }
    made = plan(arms=arm(lora={"each": "task", "equal_compute": "flix"}, settings=own))
    made.check()
    settings = made.run("other", LAST, 0, {"training.learning_rate": "0.02"}).settings
    # Not those of the common settings, which are for languages.
    assert settings.feature_dropout.per_group == {"task": 0.1}
    assert settings.evaluation.unseen_group_weights == {"task": 0.5}


@pytest.mark.parametrize(
    "lora, ranks",
    [
        ({"each": "task", "equal_compute": "flix"}, {"task": 6}),
        ({"each": "language", "equal_parameters": "flix"}, {"language": 4}),
        ({"each": "language", "rank": 3}, {"language": 3}),
        ({"rank": 5}, {"lora": 5}),
    ],
)
def test_one_lora_a_task_or_a_language(plan, lora, ranks):
    made = plan(arms=arm(lora=lora))
    made.check()
    assert made.counted("other", LAST).by_group == ranks


def test_one_lora_a_cell(plan):
    made = plan(arms=arm(lora={"each": "cell", "equal_parameters": "flix"}))
    made.check()
    counted = made.counted("other", LAST)
    ranks = counted.by_group.pop("cell")
    assert counted.by_group.keys() <= {"cell"} and len(counted.trained) == 7
    assert ranks.pop("pos/hau") == 0 and {*ranks.values()} == {2}  # 12 ranks among 7 cells
    assert counted.active == 2 and len(ranks) == 7
    run = made.run("other", LAST, 0, made.choices("other")[0])
    assert run.settings.held_out == [{"language": "hau", "task": "pos"}, {"cell": "pos/hau"}]
    made = plan(arms=arm(lora={"each": "cell", "rank": 1}, settings={"datasets": [{"hub": "x", "features": {"task": "ner"}}]}))  # fmt: skip
    with pytest.raises(SettingsError, match=r"'other'.*one LoRA for each cell needs files whose names tell their cells; the data set with 'x'"):  # fmt: skip
        made.check()


def test_ranks_may_be_proportional_and_features_dropped(plan):
    ranks = {"rule": "proportional", "budget": 20, "minimum": 1}
    made = plan(arms=arm(settings={"ranks": ranks, "feature_dropout": 0.2}))
    made.check()
    counted = made.counted("other", LAST)
    assert counted.total == 20 and counted.ranks["shared", "all"] > counted.ranks["language", "swa"]
    run = made.run("other", LAST, 0, made.choices("other")[0])
    assert run.settings.feature_dropout.p == 0.2


def test_phases_have_their_own_rows_and_all_arms_the_same_steps(plan):
    made = plan()
    choosing = made.run("flix", CHOOSING, 0, {"training.learning_rate": "0.01"})
    last = made.run("flix", LAST, 1, {"training.learning_rate": "0.01"}, {"language": 0.5})
    assert (choosing.settings.training.steps, last.settings.training.steps) == (2, 6)
    assert "rev/{language}.dev" in choosing.settings.datasets[2].eval_files
    assert "rev/{language}.test" in last.settings.datasets[2].eval_files
    assert last.settings.seed == 1 and last.settings.evaluation.samples >= 10**6
    assert last.settings.evaluation.unseen_group_weights == {"language": 0.5}
    assert choosing.folder.parts[-3:] == ("choosing", "flix", "learning_rate=0.01")
    assert last.folder.parts[-2:] == ("runs", "flix-1")
    assert last.settings.training.threads == 1 and last.settings.evaluation.limit is None


def test_an_arm_has_settings_prompts_and_data_of_its_own(plan):
    prompts = {"plain": "{source}", "tagged": "{language} {task}: {source}"}
    ranks = {"rule": "by_group", "language": 4, "task": 5, "shared": 0}
    made = plan(
        arms=arm(
            settings={"ranks": ranks, "feature_dropout": {"per_group": {"task": 0.1}}},
            choices={"prompt": prompts},
            leave_out=[{"task": "ner"}],
        )
    )
    made.check()
    assert len(made.choices("other")) == 4 and len(made.choices("flix")) == 2
    run = made.run("other", CHOOSING, 0, made.choices("other")[3])
    assert [d.prompt for d in run.settings.datasets] == [prompts["tagged"]] * 2
    assert run.settings.feature_dropout.per_group == {"language": 0.5, "task": 0.1}
    assert made.counted("other", LAST).by_group == {"language": 4, "task": 5}
    assert run.folder.name == "learning_rate=0.02,prompt=tagged"


def test_paths_of_an_arm_start_where_the_common_ones_do(tmp_path, toys):
    (tmp_path / "earlier").mkdir()
    own = {"start_from": "earlier", "tokenizer": "org/none"}
    read = read_study(write_study(tmp_path, toys, arms=arm(settings=own)))
    assert read.settings.arms["other"].settings == {
        "start_from": str(tmp_path / "earlier"),
        "tokenizer": "org/none",
    }


@pytest.mark.parametrize("each", [None, "language", "cell"])
def test_a_lora_starts_from_a_lora(plan, tmp_path, each):
    lora = {"rank": 3, "each": each} if each else {"rank": 3}
    settings = plan(arms=arm(lora=lora)).run("other", LAST, 0, {}).settings
    first = build_config(settings, read_data(settings))
    layer = LayerShape(4, 6)
    pairs = fresh_pairs(first, "a", layer).items()
    tensors = {
        f"a.{side}.{g}.{n}": x for (g, n), two in pairs for side, x in zip("AB", two, strict=True)
    }
    save_adapter(Adapter(first, {"a": layer}, tensors), tmp_path / "first")
    later = plan(arms=arm(lora=lora, settings={"start_from": "first"}))
    later.check()
    assert later.counted("other", LAST).ranks == {f: first.ranks[f] for f in first.registry.live}
    assert later.run("other", LAST, 0, {}).settings.start_from == str(tmp_path / "first")


def test_names_of_choices_are_those_of_folders():
    assert named([1e-3, 0.002, "a b", "cosine", 8]) == {
        "0.001": 1e-3, "0.002": 0.002, "number-3": "a b", "cosine": "cosine", "8": 8,
    }  # fmt: skip
    assert choice_name({}) == "as-it-is"
    with pytest.raises(SettingsError, match="the name of a value is also a folder's"):
        named({"a/b": 1})


TRAINED = [{"language": "swa", "task": "pos"}]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arm": {}}, r"toy.yaml:\d+: unknown key 'arm' \(did you mean 'arms'\?\)"),
        ({"arms": {"flix": {"setting": {}}}}, r"unknown key 'setting' in arms.flix \(did you mean 'settings'\?\)"),
        ({"arms": arm(settings={"training": {"step": 1}})}, r"arm 'other' in the phase 'choosing': unknown key 'step' in training"),
        ({"arms": arm(settings={"training": {"steps": 1}})}, r"arms.other.settings.training.steps: is the same for all arms, got 1"),
        ({"arms": arm(settings={"seed": 1})}, r"arms.other.settings.seed: is the same for all arms"),
        ({"arms": {"a b": {}}}, "an arm's name is also a folder's.* got 'a b'"),
        ({"arms": arm(lora={})}, "needs one of equal_compute:, equal_parameters: and rank:"),
        ({"arms": arm(lora={"equal_compute": "flux"})}, r"arms.other.lora: there is no arm 'flux' \(did you mean 'flix'\?\)"),
        ({"arms": arm(lora={"equal_compute": "other"})}, "'other' has no ranks of its own to be equal to"),
        ({"arms": arm(lora={"rank": 2}, settings={"ranks": 3})}, "lora: computes the ranks; leave out settings.ranks"),
        ({"arms": arm(lora={"rank": 2, "each": "tasks"})}, "lora.each: there is no group 'tasks'"),
        ({"arms": arm(adapt=False, lora={"rank": 2})}, "adapt: false is the base without training"),
        ({"arms": arm(leave_out=["task=nerr"])}, "leave_out: there is no data set whose rows all have task=nerr"),
        ({"arms": arm(leave_out=["x"])}, r"toy.yaml: arm 'other' in the phase 'choosing': arms.other.leave_out\[0\]: features are written as group=name"),
        ({"arms": arm(leave_out=["task=ner", "a=b+c"])}, r"arms.other.leave_out\[1\]: a feature's name in group 'a'"),
        ({"held_out": {"choosing": ["x"]}}, r"toy.yaml: held_out.choosing\[0\]: features are written as"),
        ({"held_out": {"last_word": ["task=a", "a=*"]}}, r"toy.yaml: held_out.last_word\[1\]: a feature's name"),
        ({"common": "gone.yaml"}, "toy.yaml: common names the file '.*gone.yaml', which does not exist"),
        ({"claims": [{"arm": "x", "against": ["flix"], "cells": "seen", "at_least": 1}]}, r"claims\[0\]: there is no arm 'x'"),
        ({"claims": [{"arm": "flix", "against": ["lora-compute"], "cells": "seem", "at_least": 1}]}, "cells: must be one of .*did you mean 'seen'"),
        ({"choosing": None, "weights": {"language": [1]}}, "weights: needs choosing:, because weights are chosen on its cells"),
        ({"seeds": [1, 1]}, "seeds: a seed is given twice"),
        ({"seeds": 0}, "seeds"),
        ({"choosing": {"choices": {"training.steps": [1, 2]}}}, "choices: training.steps is the same for all arms"),
        ({"choosing": {"by": "test"}}, "choosing.by"),
        ({"held_out": {"choosing": TRAINED}}, "arm 'flix' in the phase 'choosing' trains on task=pos,language=swa, held out for choosing; no arm may"),
        ({"held_out": {"last_word": TRAINED}}, "trains on task=pos,language=swa, held out for the last word"),
        ({"choosing": {}}, "task=pos,language=hau is both for choosing and for the last word"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(plan, changes, message):
    with pytest.raises(FlixError, match=message):
        plan(**changes).check()


def test_an_arm_that_trains_on_a_held_out_cell_is_refused(plan, toys):
    rows = str(toys / "{task}" / "{language}")
    own = [{"files": f"{rows}.train.jsonl"}, {"files": str(toys / "rev" / "yor.dev.jsonl"), "features": {"language": "yor", "task": "rev"}}]  # fmt: skip
    held = {"choosing": [{"language": "yor", "task": "rev"}]}
    made = plan(arms=arm(settings={"datasets": own, "implies": {}, "ranks": 2}), choosing=None, held_out=held)  # fmt: skip
    made.study.common["held_out"] = []
    with pytest.raises(SettingsError, match=r"arm 'other' .* trains on task=rev,language=yor, held out for choosing"):  # fmt: skip
        made.check()


def test_rows_that_seeds_draw_are_refused(plan, toys):
    common = [str(toys / "last_word.yaml"), {"datasets": [{"files": str(toys / "{task}" / "{language}.train.jsonl"), "eval_rows": 2}]}]  # fmt: skip
    with pytest.raises(SettingsError, match=r"datasets\[0\].eval_rows draws other rows with every seed"):  # fmt: skip
        plan(common=[common[0], {**common[1], "held_out": []}], choosing=None).run("flix", LAST, 0, {})  # fmt: skip


@pytest.mark.parametrize("name", ["words", "african"])
def test_what_is_shipped_is_found_by_name_and_is_well_formed(name, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    (data / "words").mkdir(parents=True)
    for file in ("choosing.yaml", "last_word.yaml"):
        (data / "words" / file).write_bytes((toys / file).read_bytes())
    read = read_study(name, data=data)
    assert read.title == name and read.output == tmp_path / f"study-{name}"
    assert {"flix", "lora-compute", "lora-parameters"} <= set(read.settings.arms)
    assert len(read.settings.all_seeds) >= 3 and read.choosing is not None and read.settings.claims
    if name == "words":
        small = read_study(name, data=data, small=True)
        # The slowest first: two processors are busy to the end.
        assert list(small.settings.arms) == ["lora-parameters", "flix", "lora-compute"]
        assert list(small.settings.choosing.choices) == ["training.learning_rate"]
        assert small.common["training"]["batch_size"] == 32 and small.common["evaluation"]["limit"] == 20  # fmt: skip
    else:
        plan = Plan(read, Counting())
        raw = plan.raw("flix", LAST)
        assert [d["eval_files"].endswith(".test.jsonl.gz") for d in raw["datasets"]] == [True] * 4
        assert len(raw["held_out"]) == 14


def test_the_small_form_is_over_the_rest(tmp_path, toys):
    small = {
        "seeds": 1, "arms": ["flix"], "common": {"training": {"steps": 3}},
        "choosing": {"choices": {"training.learning_rate": [0.03], "prompt": None}},
    }  # fmt: skip
    choosing = {"choices": {"training.learning_rate": [0.01, 0.02], "prompt": ["{source}"]}}
    path = write_study(tmp_path, toys, seeds=3, small=small, choosing=choosing)
    whole, read = read_study(path), read_study(path, small=True)
    assert list(read.settings.arms) == ["flix"] and read.settings.all_seeds == [0]
    assert read.common["training"]["steps"] == 3 and whole.common["training"]["steps"] == 6
    assert read.settings.choosing.choices == {"training.learning_rate": [0.03]}
    assert read.output.name == "study-small"
    path = write_study(tmp_path, toys, small={"arms": ["flux"]})
    with pytest.raises(SettingsError, match=r"small.arms: there is no arm 'flux' \(did you mean"):
        read_study(path, small=True)
    with pytest.raises(SettingsError, match="this study has no small form"):
        read_study(write_study(tmp_path, toys), small=True)


def test_another_length_is_another_study(tmp_path, toys):
    path = write_study(tmp_path, toys, choosing={"choices": {"training.learning_rate": [0.01, 0.02]}})  # fmt: skip
    read = read_study(path, steps=40, out=tmp_path / "longer")
    assert read.output == tmp_path / "longer"
    made, choice = Plan(read, Counting()), {"training.learning_rate": "0.01"}
    assert [made.run("flix", phase, 0, choice).settings.training.steps for phase in (CHOOSING, LAST)] == [40, 40]  # fmt: skip
    assert read_study(path).common["training"]["steps"] == 6
    with pytest.raises(SettingsError, match="--steps 40 makes another study; give it a folder of its own with --out"):  # fmt: skip
        read_study(path, steps=40)


def test_the_command_says_what_is_wrong_in_a_line(tmp_path, toys):
    result = CliRunner().invoke(app, ["study", str(tmp_path / "gone.yaml")])
    assert result.exit_code == 2 and "gone.yaml: cannot be read" in result.stderr
    result = CliRunner().invoke(app, ["study", "wordz"])
    assert result.exit_code == 2 and "no study of this name" in result.stderr
    path = write_study(tmp_path, toys)
    result = CliRunner().invoke(app, ["study", str(path), "--only", "flux"])
    assert result.exit_code == 2 and "--only: there is no arm 'flux'" in result.stderr
    result = CliRunner().invoke(app, ["study", str(path), "--list"])
    assert result.exit_code == 0 and "0 of 9 runs are finished" in result.stdout


def test_the_best_choice_is_by_one_named_figure():
    group = lambda cell: cell["group"]  # noqa: E731
    cells = [
        {"group": "seen", "score": 10.0}, {"group": "seen", "score": 20.0}, {"group": "choosing", "score": 4.0},
        {"group": "last_word", "score": 100.0},
    ]  # fmt: skip
    assert means(cells, group) == {"seen": 15.0, "choosing": 4.0, "both": 9.5}
    assert means(cells[:2], group) == {"seen": 15.0, "choosing": None, "both": None}
    table = [{"seen": 1.0, "both": 3.0}, {"seen": 2.0, "both": 3.0}, {"seen": None, "both": None}]
    assert best(table, "seen") == 1 and best(table, "both") == 0 and best(table[2:], "seen") is None
    grid = {"rate": {"1": 1, "2": 2, "3": 3}, "prompt": {"a": "x", "b": "y"}}
    assert edges({"rate": "3", "prompt": "a"}, grid) == ["rate"]
    assert edges({"rate": "2", "prompt": "a"}, grid) == []


def test_searched_weights_are_shown_and_never_chosen():
    found = [
        {"weights": {"language": how}, "cells": {"a": {"score": score}}}
        for how, score in ((1, 5.0), (0, 7.0), ("searched", 9.0))
    ]
    weights, table = best_weights(found)
    assert weights == {"language": 0} and [entry["choosing"] for entry in table] == [5.0, 7.0, 9.0]


def test_an_arm_that_is_not_whole_has_no_figures():
    cells = {"a": {"group": "seen", "score": 50.0}, "b": {"group": "last_word", "score": 10.0}}
    said = {"title": "t", "active_rank": 1, "total_rank": 2, "trainable": 3}
    scores = {
        "arms": {
            "flix": {**said, "seeds": {"0": {"cells": cells}, "1": {"cells": cells}}},
            "lora": {**said, "seeds": {"0": {"cells": cells}}},
        },
        "missing": ["lora, seed 1"],
    }
    # A cell that another arm lacks counts for none.
    scores["arms"]["flix"]["seeds"]["0"]["cells"] = {**cells, "c": {"group": "seen", "score": 0.0}}
    whole, part = rows(scores)
    assert whole[1:4] == ["50.0 ±0.0", "-", "10.0 ±0.0"] and whole[-1] == "2"
    assert part[1:4] == ["unfinished"] * 3 and part[-1] == "1 of 2"


def test_the_resolved_configuration_reads_again(plan):
    from flix.study.run import resolved

    made = plan()
    text = resolved(made.study)
    assert yaml.safe_load(text)["common"]["datasets"][0]["files"].startswith("/")
