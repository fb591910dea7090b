"""Rows and cells: what is trained, and what is held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flix.training.errors import DataError, SettingsError
from tests.helpers.training import corpus_of


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


def test_declared_registry_refuses_what_it_lacks(config: Callable[..., Path]) -> None:
    registry = {"task": ["ner", "pos", "rev"], "language": ["hau", "swa"], "shared": ["all"]}
    with pytest.raises(DataError, match=r"dataset .*ner\.jsonl.*no feature 'yor'"):
        corpus_of(config(registry=registry, held_out=[]))
