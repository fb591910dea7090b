"""YAML: what is read as another thing than it looks, what harms, and where it stands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flix.core.strictyaml import REPEATED, read_tree
from flix.training.errors import SettingsError
from flix.training.reading import parse_settings, read_settings
from tests.training.test_settings import BASE

RANKS = "ranks: {rule: explicit, ranks: {language: {%s: 2}, task: 2}}\n"
FEATURES = BASE.replace("hau", "%s")


@pytest.mark.parametrize("word", ["no", "NO", "off", "yes", "on", "true", "False", "1", "1.5", "~", "null", "2020-01-01"])  # fmt: skip
@pytest.mark.parametrize(
    "text",
    [
        BASE + RANKS,
        BASE + "held_out: [{language: %s}]\n",
        BASE + "held_out: [{%s: hau}]\n",
        BASE + "registry: {language: [hau, %s], task: [ner]}\n",
        BASE + "registry: {%s: [hau], task: [ner]}\n",
        BASE + "implies: {task=ner: %s}\n",
        BASE + "implies: {%s: task=ner}\n",
        BASE + "unknown: {%s: hau}\n",
        BASE + "unknown: {zul: %s}\n",
        BASE + "unknown: {zul: [hau, %s]}\n",
        BASE + "feature_dropout: {per_group: {%s: 0.5}}\n",
        BASE + "alpha: {language: {%s: 2}}\n",
        BASE + "rank_pattern: {q: {language: {%s: 2}}}\n",
        BASE + "alpha_pattern: {q: {language: {%s: 2}}}\n",
        BASE + "ranks: {rule: by_group, %s: 2}\n",
        BASE + "ranks: {rule: proportional, budget: 9, sizes: {language: {%s: 2}}}\n",
        BASE + "evaluation: {unseen_group_weights: {%s: 0.5}}\n",
        FEATURES,
        BASE.replace("hau", "[hau, %s]"),
        BASE.replace("hau", "{%s: 0.5}"),
        BASE.replace("language: hau", "%s: hau"),
        BASE.replace("{language: hau, task: ner}", "{task: ner}\n    feature_columns: {language: %s}"),
        BASE.replace("{language: hau, task: ner}", "{task: ner}\n    feature_columns: {%s: lang}"),
        BASE.replace("model: m", "model: %s"),
        BASE.replace("files: a.jsonl", "files: [%s]"),
        "%s: x\n" + BASE,
    ],
)  # fmt: skip
def test_a_word_that_is_no_text_is_refused_where_a_name_is_meant(text: str, word: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(text % word, "c.yaml")
    message = str(caught.value)
    assert "quote it" in message and "YAML" in message and word in message
    assert message.startswith("c.yaml:") and message.split(":")[1].isdigit()
    # In quotes it is a name, wherever names are free.
    quoted = text % f"'{word}'"
    try:
        parse_settings(quoted, "c.yaml")
    except SettingsError as error:
        assert "quote it" not in str(error)


NUMBERS = [
    "seed", "temperature", "ranks.language", "training.steps", "training.learning_rate", "training.warmup_ratio",
    "training.eval_every", "evaluation.limit", "evaluation.num_beams", "feature_dropout.p", "alpha",
]  # fmt: skip


@pytest.mark.parametrize("word", ["on", "yes", "no", "off", "true"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_truth_value_is_no_number(key: str, word: str) -> None:
    section, _, inner = key.rpartition(".")
    value = f"{{{'rule: by_group, ' if section == 'ranks' else ''}{inner}: {word}}}" if section else word  # fmt: skip
    with pytest.raises(SettingsError, match=rf"must be a number; YAML reads {word} without quotes as a truth value") as caught:  # fmt: skip
        parse_settings(f"{BASE}{section or key}: {value}\n", "c.yaml")
    assert str(caught.value).startswith(f"c.yaml:6: {key}")


def test_weights_of_features_are_no_truth_values() -> None:
    with pytest.raises(SettingsError, match="YAML reads on without quotes"):
        parse_settings(BASE.replace("hau", "{hau: on}"))
    assert parse_settings(BASE + "training: {bf16: on}\n").training.bf16 is True


HARM = {
    "an alias that holds itself": ("a: &a [*a]", "part of"),
    "two that hold each other": ("a: &a {b: &b [*a]}", "part of"),
    "a merge of itself": ("a: &a {<<: *a}", "part of"),
    "a bomb": (
        "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
        "aliases repeat more than 100,000 values",
    ),
    "a bomb of mappings": (
        "a0: &a0 {x: 1}\n"
        + "".join(
            f"a{i + 1}: &a{i + 1} {{{','.join(f'k{j}: *a{i}' for j in range(10))}}}\n"
            for i in range(9)
        ),
        "aliases repeat more than 100,000 values",
    ),
    "depth": ("a: " + "[" * 100_000, "nest"),
    "depth that ends": ("a: " + "[" * 900 + "]" * 900, "nest"),
    "depth in blocks": ("".join(" " * i + "a:\n" for i in range(3000)), "nest"),
    "depth of dashes": ("- " * 50_000 + "x", "nest"),
    "a number of many digits": ("seed: " + "9" * 5000, "not valid YAML"),
    "a date that is none": ("seed: 2020-99-99", "not valid YAML"),
    "a control character": ("a: \x01", "not valid YAML"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    "a tag that does not fit": ("seed: !!int x", "not valid YAML"),
    "another": ("seed: !!timestamp x", "not valid YAML"),
    "and another": ("a: !!bool x", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "an unknown alias": ("a: *b", "not valid YAML"),
    "a list as a key": ("? [a]\n: 1", "a key must be text"),
    "half a surrogate pair": (
        BASE.replace("model: m", 'model: "\\ud800"'),
        "surrogate|not valid YAML",
    ),
    "a NUL": (BASE + 'output: "a\\0b"\n', "NUL"),
    "a seed beyond all": (BASE + "seed: 99999999999999999999", "seed"),
    "steps beyond all": (BASE + "training: {steps: 1000000000000}", "training.steps"),
    "a rank beyond all": (BASE + "ranks: 1000000000000", "ranks.rank"),
    "the same key many times": ("a: 1\n" * 20_000, "given twice"),
}


@pytest.mark.parametrize("kind", HARM)
def test_what_harms_is_refused_in_seconds(kind: str) -> None:
    text, message = HARM[kind]
    began = time.perf_counter()
    with pytest.raises(SettingsError, match=message) as caught:
        parse_settings(text, "c.yaml")
    assert time.perf_counter() - began < 10
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_aliases_and_merges_serve_as_they_should() -> None:
    text = "shared: &shared {task: ner}\nlist: [*shared, *shared]\nmerged: {<<: *shared, language: hau}\n"
    tree = read_tree(text, "c")
    assert tree.data["list"] == [{"task": "ner"}] * 2
    assert tree.data["merged"] == {"task": "ner", "language": "hau"}
    assert tree.lines["merged", "language"] == 3 and tree.lines["list", 1, "task"] == 1
    many = "a: &a [" + ",".join("x" * 1 for _ in range(99)) + "]\nb: [" + ",".join(["*a"] * 900) + "]\n"  # fmt: skip
    assert len(read_tree(many, "c").data["b"]) == 900 and REPEATED > 900 * 100
    # A large file without aliases is only large.
    big = "a: [" + ",".join(["x"] * 150_000) + "]\n"
    assert len(read_tree(big, "c").data["a"]) == 150_000


def test_bytes_before_and_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert read_settings(file).model == "m"
    file.write_bytes(b"\xef\xbb\xbf" + b"sede: 1\n" + BASE.encode())
    with pytest.raises(SettingsError, match=r"c\.yaml:1: unknown key 'sede'"):
        read_settings(file)
    file.write_bytes(b"# x\n" * (5 << 20))
    with pytest.raises(SettingsError, match="larger than 4 MB"):
        read_settings(file)


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse_settings(BASE + "output: ~/runs\n", folder=Path("/elsewhere"))
    assert settings.output_folder == tmp_path / "runs"


def test_held_out_cells_may_be_written_as_they_are_shown() -> None:
    settings = parse_settings(BASE + "held_out: ['language=hau,task=ner', {task: pos}]\n")
    assert settings.held_out == ["language=hau,task=ner", {"task": "pos"}]
