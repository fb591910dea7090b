"""Scores beside those of seqeval, scikit-learn and SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import sklearn.metrics

import flix
from flix.tasks import Answer, DataError, interval, scores

TAGS = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tagged(wanted: list[str], said: list[str | None], entities: bool = True) -> Answer:
    detail: dict[str, Any] = {"wanted": wanted, "tags": said, "entities": entities}
    return Answer("", " ".join(wanted), "", wanted == said, detail)


def labelled(wanted: str, said: str) -> Answer:
    return Answer("", wanted, said, wanted == said)


def rated(wanted: float, said: float) -> Answer:
    return Answer("", f"{wanted:g}", f"{said:g}", None, {"value": said, "wanted": wanted})


def test_entity_f1_is_seqevals() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        lengths = draw.integers(1, 9, 6)
        wanted = [[*map(str, draw.choice(TAGS, n))] for n in lengths]
        said = [[*map(str, draw.choice(TAGS, n))] for n in lengths]
        found = scores("tagging", [tagged(w, [*s]) for w, s in zip(wanted, said, strict=True)])
        assert [*found] == ["entity_f1", "accuracy"]
        assert found["entity_f1"] == pytest.approx(100 * seqeval.metrics.f1_score(wanted, said), abs=0.01)  # fmt: skip
        assert found["accuracy"] == pytest.approx(100 * seqeval.metrics.accuracy_score(wanted, said), abs=0.01)  # fmt: skip


def test_lost_words_are_wrong() -> None:
    found = scores("tagging", [tagged(["O", "B-PER", "O"], ["O", None, None])])
    assert found == {"entity_f1": 0.0, "accuracy": 33.33}
    whole = scores("tagging", [tagged(["B-PER", "O"], ["B-PER", None])])
    assert whole == {"entity_f1": 100.0, "accuracy": 50.0}
    # An entity of which a word is lost is not found whole.
    cut = scores("tagging", [tagged(["B-PER", "I-PER"], ["B-PER", None])])
    assert cut["entity_f1"] == 0.0


def test_tags_that_are_no_entities_have_accuracy() -> None:
    found = [
        tagged(["NOUN", "VERB"], ["NOUN", "NOUN"], False),
        tagged(["ADJ"], [None], False),
        tagged([], [], False),
    ]
    assert scores("tagging", found) == {"accuracy": 33.33, "macro_f1": 22.22}
    low, high = interval("tagging", found)
    assert 0 <= low < 33.33 < high <= 100


def test_scores_of_nothing_are_none() -> None:
    nothing = [tagged(["O"], ["O"]), tagged([], [])]
    assert math.isnan(scores("tagging", nothing)["entity_f1"])
    assert all(map(math.isnan, interval("tagging", nothing)))
    assert scores("tagging", [tagged(["O"], ["B-PER"])])["entity_f1"] == 0.0
    one = scores("regression", [rated(1.0, 2.0)])
    assert math.isnan(one["pearson"]) and math.isnan(one["spearman"]) and one["rmse"] == 1.0
    masked = [Answer("", "", "", None, {"right": 0, "masked": 0, "loss": 0.0})]
    assert all(map(math.isnan, scores("masked", masked).values()))


def test_classification_is_scikit_learns() -> None:
    draw = np.random.default_rng(1)
    for _ in range(10):
        wanted, said = (draw.choice(["a", "b", "c", "d"], 30).tolist() for _ in range(2))
        said = [w if draw.random() < 0.5 else s for w, s in zip(wanted, said, strict=True)]
        found = scores("classification", [labelled(w, s) for w, s in zip(wanted, said, strict=True)])  # fmt: skip
        assert found == {
            "accuracy": pytest.approx(100 * sklearn.metrics.accuracy_score(wanted, said), abs=0.01),
            "macro_f1": pytest.approx(100 * sklearn.metrics.f1_score(wanted, said, average="macro"), abs=0.01),
        }  # fmt: skip


def test_regression_is_scipys() -> None:
    draw = np.random.default_rng(2)
    for shift in (0.0, 1e6):
        wanted = draw.integers(0, 6, 40).astype(float) + shift
        said = wanted + draw.normal(size=40)
        found = scores("regression", [rated(w, s) for w, s in zip(wanted, said, strict=True)])
        assert found == {
            "pearson": pytest.approx(100 * scipy.stats.pearsonr(said, wanted)[0], abs=0.01),
            "spearman": pytest.approx(100 * scipy.stats.spearmanr(said, wanted)[0], abs=0.01),
            "rmse": pytest.approx(float(np.sqrt(np.mean((said - wanted) ** 2))), abs=0.01),
        }
        low, high = interval("regression", [rated(w, s) for w, s in zip(wanted, said, strict=True)])
        assert low < found["pearson"] < high


def test_masked_texts_count_each_token_once() -> None:
    found = [
        Answer("", "", "", None, {"right": 1, "masked": 1, "loss": 0.5}),
        Answer("", "", "", None, {"right": 0, "masked": 3, "loss": 3.5}),
    ]
    assert scores("masked", found) == {"accuracy": 25.0, "perplexity": round(math.exp(1.0), 2)}
    far = [Answer("", "", "", None, {"right": 0, "masked": 1, "loss": 900.0})]
    assert scores("masked", far)["perplexity"] == math.inf


def test_intervals_hold_the_score_and_shrink() -> None:
    draw = np.random.default_rng(3)
    few = [tagged([*map(str, draw.choice(TAGS, 6))], [*map(str, draw.choice(TAGS, 6))]) for _ in range(20)]  # fmt: skip
    widths = []
    for found in (few, few * 20):
        low, high = interval("tagging", found, seed=4)
        assert low <= scores("tagging", found)["entity_f1"] <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    # As sure as can be: every row is right.
    assert interval("classification", [labelled("a", "a")] * 5) == (100.0, 100.0)


def test_mistakes() -> None:
    with pytest.raises(flix.ConfigError, match=r"no kind 'taging' .did you mean 'tagging'"):
        scores("taging", [labelled("a", "a")])
    with pytest.raises(DataError, match="answer 1 cannot be scored: its row does not say"):
        scores("classification", [labelled("a", "a"), Answer("", None, "a", None)])
