"""YAML: what is read as another thing than it looks, what harms, and where it stands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

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


# More of the kind stands in tests/core/test_strictyaml.py: these go through a whole form.
HARM = {
    "a merge of itself": ("a: &a {<<: *a}", "part of"),
    "depth": ("a: " + "[" * 100_000, "nest"),
    "a number of many digits": ("seed: " + "9" * 5000, "not valid YAML"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    "half a surrogate pair": (
        BASE.replace("model: m", 'model: "\\ud800"'),
        "unicode string|not valid YAML",
    ),
    "a NUL": (BASE + 'output: "a\\0b"\n', "NUL"),
    "a seed beyond all": (BASE + "seed: 99999999999999999999", "seed"),
    "steps beyond all": (BASE + "training: {steps: 1000000000000}", "training.steps"),
    "a rank beyond all": (BASE + "ranks: 1000000000000", "ranks.rank"),
}


@pytest.mark.parametrize("kind", HARM)
def test_what_harms_is_refused_in_seconds(kind: str) -> None:
    text, message = HARM[kind]
    began = time.process_time()
    with pytest.raises(SettingsError, match=message) as caught:
        parse_settings(text, "c.yaml")
    assert time.process_time() - began < 10
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


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


def test_a_list_of_lines_is_refused_in_the_line_of_the_mistake() -> None:
    files = BASE.replace("files: a.jsonl", "files:\n    - a\n    - 2020-01-01\n    - b")
    with pytest.raises(SettingsError) as caught:
        parse_settings(files, "c.yaml")
    assert str(caught.value) == (
        "c.yaml:6: datasets[0].files[1]: must be text; YAML reads 2020-01-01 without quotes as a date (2020-01-01) - quote it"
    )


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse_settings(BASE + "output: ~/runs\n", folder=Path("/elsewhere"))
    assert settings.output_folder == tmp_path / "runs"


def test_held_out_cells_may_be_written_as_they_are_shown() -> None:
    settings = parse_settings(BASE + "held_out: ['language=hau,task=ner', {task: pos}]\n")
    assert settings.held_out == ["language=hau,task=ner", {"task": "pos"}]
