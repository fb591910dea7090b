"""Batches: labels, padding, routing, dropout, and the weights of combinations never trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

import flix
from flix.training.batches import IGNORED, Collator, RoutingTable, Texts
from flix.training.corpus import Corpus, build_corpus
from flix.training.errors import DataError
from flix.training.features import build_config
from flix.training.mixture import Mixture, items
from flix.training.reading import read_settings
from flix.training.sources import read_rows


def parts(path: Path, kind: str, **limits: Any) -> tuple[Corpus, Collator]:
    settings = read_settings(path)
    corpus = build_corpus(settings, read_rows(settings))
    table = RoutingTable(corpus, "error", settings.evaluation.unseen_group_weights)
    sizes = {"max_source": 64, "max_target": 64, **limits}
    texts = Texts(ByT5Tokenizer(), kind, **sizes)
    config = build_config(settings, corpus)
    return corpus, Collator(texts, table, config, seed=settings.seed, batch_size=4)


def test_causal_labels_cover_the_target_alone(config: Callable[..., Path]) -> None:
    corpus, collate = parts(config("llama"), "causal")
    batch = collate(items(corpus.evaluation)[:3])
    tokenizer = collate.texts.tokenizer
    for row, item in enumerate(items(corpus.evaluation)[:3]):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row, :length].tolist()
        assert tokenizer.decode(ids) == item.row.prompt + item.row.target + "</s>"
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != IGNORED]) == item.row.target + "</s>"
    prompts = collate.prompts(items(corpus.evaluation)[:3])
    assert prompts["attention_mask"][:, -1].all()
    assert tokenizer.decode(prompts["input_ids"][0], skip_special_tokens=True).endswith(
        items(corpus.evaluation)[0].row.prompt
    )


def test_seq2seq_labels(config: Callable[..., Path]) -> None:
    corpus, collate = parts(config(), "seq2seq")
    batch = collate(items(corpus.evaluation)[:2])
    assert batch["labels"][0, :3].tolist() == collate.texts.tokenizer("n0").input_ids
    assert batch["input_ids"].shape == batch["attention_mask"].shape


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_long_texts_are_cut(config: Callable[..., Path], kind: str) -> None:
    corpus, collate = parts(config(), kind, max_source=5, max_target=2)
    row = corpus.train.rows[0]
    source, target = collate.texts.source(row), collate.texts.target(row)
    assert len(source) == 5 and len(target) == 2 and target[-1] == 1
    assert (source[-1] == 1) == (kind == "seq2seq")


def test_a_tokenizer_of_another_model_is_refused(config: Callable[..., Path]) -> None:
    corpus, collate = parts(config(), "seq2seq", vocabulary=20)
    with pytest.raises(DataError, match="do not belong together"):
        collate(items(corpus.evaluation)[:1])


def test_dropout_is_keyed_by_step_and_row(config: Callable[..., Path]) -> None:
    corpus, collate = parts(config(), "seq2seq")
    mixture = Mixture(corpus.train, length=80, temperature=1.0, seed=1)
    batches = [collate(mixture.__getitems__(list(range(i, i + 4)))) for i in range(0, 80, 4)]
    again = collate(mixture.__getitems__(list(range(40, 44))))
    assert torch.equal(again["flix_features"], batches[10]["flix_features"])
    registry = corpus.registry
    ids = np.concatenate([b["flix_features"].numpy() for b in batches])
    language = np.isin(ids, registry.ids_of("language")).sum()
    assert 20 < language < 60 and np.isin(ids, registry.ids_of("task")).sum() == 80
    # The reference: flix's own dropout of the same routing.
    plain = registry.encode([i.row.features for i in mixture.__getitems__(list(range(40, 44)))])
    dropped = collate.config.feature_dropout(plain, seed=3, step=10)  # type: ignore[misc]
    assert np.array_equal(again["flix_features"].numpy(), dropped.ids)
    # Not in evaluation.
    still = collate(items(corpus.evaluation))["flix_features"].numpy()
    assert (np.isin(still, registry.ids_of("language")).sum(axis=1) == 1).all()


def test_unseen_combinations_are_weighted(config: Callable[..., Path]) -> None:
    path = config(evaluation={"unseen_group_weights": {"language": 0.25}})
    corpus, collate = parts(path, "seq2seq")
    everything = items(corpus.evaluation)
    batch = collate(everything)
    is_language = np.isin(batch["flix_features"].numpy(), corpus.registry.ids_of("language"))
    unseen = ~corpus.trained[corpus.evaluation.cells]
    assert unseen.sum() == 12
    weights = batch["flix_weights"].numpy()
    assert (weights[unseen][is_language[unseen]] == 0.25).all()
    assert (weights[~unseen] == 1.0).all() and (weights[unseen][~is_language[unseen]] == 1.0).all()
    with pytest.raises(flix.FeatureError, match="langage"):
        parts(config(evaluation={"unseen_group_weights": {"langage": 0.25}}), "seq2seq")
