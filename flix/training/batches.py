"""Batches: texts to padded tokens and labels, features to routing, dropout in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flix.core.config.config import FlixConfig
from flix.core.features.dropout import FeatureDropout
from flix.core.features.encoding import Unknown
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import Routing
from flix.training.corpus import Corpus
from flix.training.errors import DataError
from flix.training.mixture import Item

IGNORED = -100
"""The label of tokens that count for no loss."""


class RoutingTable:
    """The routing of every combination of a corpus, all of one width, so that a batch's is a look-up.

    Args:
        corpus: the data.
        unknown: the policy for unknown features.
        unseen_group_weights: factors for groups of features, in combinations never trained.

    Raises:
        FeatureError: a factor for a group that does not exist.
    """

    def __init__(
        self,
        corpus: Corpus,
        unknown: Unknown = "error",
        unseen_group_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.registry: FeatureRegistry = corpus.registry
        rows = corpus.combinations
        seen = self.registry.encode(rows, unknown)
        unseen = self.registry.encode(
            rows, unknown, width=seen.width, group_weights=unseen_group_weights or {}
        )
        trained_cells = np.zeros(len(rows), bool)
        for examples in (corpus.train, corpus.evaluation):
            trained_cells[examples.combinations] = corpus.trained[examples.cells]
        self.ids: NDArray[np.int32] = seen.ids
        self.weights: NDArray[np.float32] = np.where(
            trained_cells[:, None], seen.weights, unseen.weights
        )

    @property
    def width(self) -> int:
        """The number of entries of a row."""
        return int(self.ids.shape[1])

    def routing(self, combinations: Sequence[int]) -> Routing:
        """The routing of a batch, ids and weights ``[batch, width]``."""
        where = np.asarray(combinations, np.int64)
        return Routing(self.ids[where], self.weights[where], self.registry)


class Texts:
    """Rows to token ids, for either kind of model.

    A sequence-to-sequence model reads the prompt and writes the target. A causal model reads the prompt, without the
    end mark that some tokenizers put there, and continues with the target and the end mark.

    Args:
        tokenizer: a transformers tokenizer.
        kind: ``"seq2seq"`` or ``"causal"``.
        max_source, max_target: longer texts are cut: prompts of a causal model at their start, all others at the end.
        vocabulary: the size of the model's embedding; larger ids are refused.
    """

    def __init__(
        self, tokenizer: Any, kind: str, max_source: int, max_target: int, vocabulary: int | None = None
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.kind = kind
        self.max_source = max_source
        self.max_target = max_target
        self.vocabulary = vocabulary
        self.end: int | None = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else self.end if self.end is not None else 0

    def source(self, row: Any) -> list[int]:
        """The input's ids."""
        ids = list(self.tokenizer(row.prompt)["input_ids"])
        if self.kind == "seq2seq":
            return self._checked(self._cut(ids, self.max_source), row.prompt)
        if ids and ids[-1] == self.end:
            ids.pop()
        if len(ids) > self.max_source:
            begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = begin + ids[len(ids) - self.max_source + len(begin) :]
        return self._checked(ids or [self.pad], row.prompt)

    def target(self, row: Any) -> list[int]:
        """The wanted output's ids, with the end mark."""
        if self.kind == "seq2seq":
            ids = list(self.tokenizer(text_target=row.target)["input_ids"])
            return self._checked(self._cut(ids, self.max_target), row.target)
        ids = list(self.tokenizer(row.target, add_special_tokens=False)["input_ids"])
        ids = ids[: self.max_target - 1] + ([self.end] if self.end is not None else [])
        return self._checked(ids, row.target)

    def unknown(self, text: str) -> tuple[int, int]:
        """How many of a text's tokens the tokenizer has no token for, and how many there are."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids.count(self.tokenizer.unk_token_id), len(ids)

    def _cut(self, ids: list[int], longest: int) -> list[int]:
        if len(ids) <= longest:
            return ids
        tail = [ids[-1]] if ids[-1] == self.end else []
        return ids[: longest - len(tail)] + tail

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            raise DataError(
                f"the tokenizer gives the id {max(ids)} for {text[:40]!r}, but the model's embedding "
                f"has {self.vocabulary} rows; model and tokenizer do not belong together"
            )
        return ids


class Collator:
    """Items to a batch: ``input_ids``, ``attention_mask``, ``labels``, ``flix_features``, ``flix_weights``.

    Args:
        texts: how rows become tokens.
        table: how combinations become routing.
        config: its feature dropout acts on training items, keyed by (seed, micro-batch, row).
        seed: of the dropout.
        batch_size: rows of a micro-batch, which a position is divided by to number it.
    """

    def __init__(
        self, texts: Texts, table: RoutingTable, config: FlixConfig, *, seed: int, batch_size: int
    ) -> None:
        self.texts = texts
        self.table = table
        self.config = config
        self.dropout: FeatureDropout | None = config.feature_dropout
        self.seed = seed
        self.batch_size = batch_size

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Tokens ``[batch, length]``, routing ``[batch, width]``."""
        sources = [self.texts.source(item.row) for item in items]
        targets = [self.texts.target(item.row) for item in items]
        if self.texts.kind == "causal":
            inputs = [s + t for s, t in zip(sources, targets, strict=True)]
            labels = [[IGNORED] * len(s) + t for s, t in zip(sources, targets, strict=True)]
        else:
            inputs, labels = sources, targets
        return {
            "input_ids": _padded(inputs, self.texts.pad),
            "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
            "labels": _padded(labels, IGNORED),
            **routing_tensors(self._routing(items)),
        }

    def _routing(self, items: Sequence[Item]) -> Routing:
        routing = self.table.routing([item.combination for item in items])
        first = items[0].position
        if self.dropout is None or first is None:
            return routing
        step, row = divmod(first, self.batch_size)
        return self.dropout(routing, seed=self.seed, step=step, first_row=row)

    def prompts(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """A batch to generate from; a causal model's prompts are padded on the left."""
        sources = [self.texts.source(item.row) for item in items]
        left = self.texts.kind == "causal"
        return {
            "input_ids": _padded(sources, self.texts.pad, left),
            "attention_mask": _padded([[1] * len(ids) for ids in sources], 0, left),
            **routing_tensors(self.table.routing([item.combination for item in items])),
        }


def routing_tensors(routing: Routing) -> dict[str, torch.Tensor]:
    """Routing as the forward's two keywords."""
    return {
        "flix_features": torch.from_numpy(routing.ids.astype(np.int64)),
        "flix_weights": torch.from_numpy(np.array(routing.weights)),
    }


def _padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    full = torch.full((len(rows), longest), pad, dtype=torch.long)
    for number, row in enumerate(rows):
        values = torch.tensor(row, dtype=torch.long)
        if left:
            full[number, longest - len(row) :] = values
        else:
            full[number, : len(row)] = values
    return full
