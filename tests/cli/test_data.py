"""Rows, cells and the mixture: what is trained, what is held out, what is drawn when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flix
from flix.training.corpus import Corpus, build_corpus
from flix.training.errors import DataError, SettingsError
from flix.training.features import build_config
from flix.training.mixture import Mixture
from flix.training.reading import read_settings
from flix.training.sources import fill, read_jsonl, read_rows


def corpus_of(path: Path) -> Corpus:
    settings = read_settings(path)
    return build_corpus(settings, read_rows(settings))


def has(features: dict[str, Any], **wanted: str) -> bool:
    return all(features.get(group) == name for group, name in wanted.items())


def test_held_out_cells_are_for_evaluation_only(config: Callable[..., Path]) -> None:
    corpus = corpus_of(config())
    assert not any(has(row.features, language="yor", task="rev") for row in corpus.train.rows)
    held = [r for r in corpus.evaluation.rows if has(r.features, language="yor", task="rev")]
    assert len(held) == 12
    assert corpus.held_back == 8 * 2  # eval_rows of every seen cell
    assert len(corpus.train) == 8 * 10 and len(corpus.evaluation) == 16 + 12
    names = dict(zip(corpus.names, corpus.trained.tolist(), strict=True))
    assert [name for name, trained in names.items() if not trained] == ["task=rev,language=yor"]
    trained = {(r.source, str(r.features)) for r in corpus.train.rows}
    assert not trained & {(r.source, str(r.features)) for r in corpus.evaluation.rows}


def test_a_held_out_cell_may_name_some_groups_or_implied_features(
    config: Callable[..., Path],
) -> None:
    corpus = corpus_of(config(held_out=[{"language": "yor"}]))
    assert not any(row.features["language"] == "yor" for row in corpus.train.rows)
    with pytest.raises(DataError, match="no rows are left"):
        corpus_of(config(held_out=[{"shared": "all"}]))


def test_held_out_mistakes(config: Callable[..., Path]) -> None:
    with pytest.raises(SettingsError, match=r"held_out\[0\].*'hua'.*'hau'"):
        corpus_of(config(held_out=[{"language": "hua"}]))
    with pytest.raises(SettingsError, match=r"held_out\[0\] is empty"):
        corpus_of(config(held_out=[{}]))


def test_registry_and_sizes(config: Callable[..., Path]) -> None:
    path = config(ranks={"rule": "proportional", "budget": 30})
    corpus = corpus_of(path)
    assert corpus.registry.groups == ("task", "language", "shared")
    sizes = corpus.sizes()
    assert sizes["shared", "all"] == 80 and sizes["task", "rev"] == 20
    ranks = build_config(read_settings(path), corpus).ranks
    assert sum(ranks.values()) == 30 and ranks["shared", "all"] == max(ranks.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ranks", "total"),
    [
        (4, 28),
        ({"rule": "explicit", "ranks": {"task": 1, "language": {"hau": 2, "swa": 3, "yor": 4}, "shared": 1}}, 13),
        ({"rule": "compute_matched", "lora_rank": 9}, 21),
        ({"rule": "parameter_matched", "lora_rank": 16}, 16),
    ],
)  # fmt: skip
def test_every_rank_rule(config: Callable[..., Path], ranks: Any, total: int) -> None:
    path = config(ranks=ranks)
    assert sum(build_config(read_settings(path), corpus_of(path)).ranks.values()) == total  # type: ignore[union-attr]


def test_declared_registry_refuses_what_it_lacks(config: Callable[..., Path]) -> None:
    registry = {"task": ["ner", "pos", "rev"], "language": ["hau", "swa"], "shared": ["all"]}
    with pytest.raises(DataError, match=r"dataset .*ner\.jsonl.*no feature 'yor'"):
        corpus_of(config(registry=registry, held_out=[]))


def test_mixture_is_a_function_of_seed_and_position(config: Callable[..., Path]) -> None:
    corpus = corpus_of(config())
    mixture = Mixture(corpus.train, length=10_000, temperature=2.0, seed=5)
    whole = mixture.draw(range(10_000))
    assert np.array_equal(whole[700:900], mixture.draw(range(700, 900)))
    assert mixture[17].row is corpus.train.rows[whole[17]] and mixture[17].position == 17
    other = Mixture(corpus.train, length=10_000, temperature=2.0, seed=6)
    assert not np.array_equal(whole, other.draw(range(10_000)))
    drawn = {corpus.names[c] for c in corpus.train.cells[whole].tolist()}
    assert len(drawn) == 8 and "task=rev,language=yor" not in drawn
    assert len(set(whole.tolist())) == len(corpus.train)


def test_mixture_shows_all_rows_of_a_cell_before_any_again(config: Callable[..., Path]) -> None:
    corpus = corpus_of(config())
    mixture = Mixture(corpus.train, length=1, temperature=2.0, seed=5)
    # The length of a run changes no row of it: a run can be resumed for more steps.
    longer = Mixture(corpus.train, length=999, temperature=2.0, seed=5)
    drawn = mixture.draw(range(333))
    assert np.array_equal(drawn, longer.draw(range(333)))
    epochs = mixture.draw(range(3 * len(corpus.train)))
    counts = np.bincount(epochs, minlength=len(corpus.train))
    for cell in np.unique(corpus.train.cells):
        own = counts[corpus.train.cells == cell]
        assert own.max() - own.min() <= 1


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_mixture_follows_the_temperature(
    tmp_path: Path, config: Callable[..., Path], temperature: float
) -> None:
    lines = [{"l": "a"}] * 900 + [{"l": "b"}] * 100
    text = "".join(
        json.dumps({**r, "source": str(i), "target": "t"}) + "\n" for i, r in enumerate(lines)
    )
    (tmp_path / "d.jsonl").write_text(text, encoding="utf-8")
    path = config(
        datasets=[{"files": "d.jsonl", "feature_columns": {"l": "l"}}],
        held_out=[],
        implies={},
        ranks=1,
    )
    corpus = corpus_of(path)
    mixture = Mixture(corpus.train, length=1, temperature=temperature, seed=0)
    share = np.mean(corpus.train.cells[mixture.draw(range(40_000))] == 0)
    wanted = 9 ** (1 / temperature) / (1 + 9 ** (1 / temperature))
    assert abs(share - wanted) < 0.01


def test_prompt_templates() -> None:
    assert fill("{{{a}}} {b}", {"a": 1, "b": "x"}, "f:1") == "{1} x"
    with pytest.raises(DataError, match=r"f:1.*needs 'sorce'.*'source'"):
        fill("{sorce}", {"source": "x"}, "f:1")
    with pytest.raises(DataError, match="single"):
        fill("{", {}, "f:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "bad.jsonl:2: not valid JSON"), ("[1]", "bad.jsonl:2: a row is a JSON object")],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"a": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_jsonl(file))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "nope.jsonl"}, "no file matches"),
        ({"source": "sorce"}, "no column 'sorce' (did you mean 'source'?)"),
        ({"feature_columns": {"language": "language"}}, "no column 'language'"),
        ({"prompt": "{txt}"}, "needs 'txt'"),
        ({"eval_rows": 100}, "too few"),
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
        corpus_of(config(datasets=[dataset], held_out=[]))
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
    corpus = corpus_of(config(datasets=[entry], held_out=[]))
    assert len(corpus.train) == 36 and len(corpus.evaluation) == 36
    with pytest.raises(DataError, match="cannot be loaded"):
        corpus_of(config(datasets=[{**entry, "split": "none"}], held_out=[]))
