"""What a run should know of its data before it costs hours: nothing here changes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flix.training.corpus import Corpus, Examples
from flix.training.errors import DataError

if TYPE_CHECKING:
    from flix.training.batches import Texts

_LOOKED_AT = 50  # rows of a combination


def unknown_targets(
    texts: Texts, corpus: Corpus, examples: Examples, *, refuse: bool = True
) -> list[str]:
    """What to say of targets that the tokenizer has no tokens for: the model cannot learn to write them.

    Args:
        texts: how rows become tokens.
        corpus: the data.
        examples: the rows whose targets are looked at, the first ones of each combination.
        refuse: whether a combination whose targets are nothing but unknown tokens is an error.

    Raises:
        DataError: a combination's targets are nothing but unknown tokens.
    """
    if texts.tokenizer.unk_token_id is None:
        return []
    notes = []
    for cell in np.unique(examples.cells).tolist():
        places = np.flatnonzero(examples.cells == cell)[:_LOOKED_AT].tolist()
        counts = {examples.rows[i].target: texts.unknown(examples.rows[i].target) for i in places}
        lost = {target: n for target, n in counts.items() if n[0]}
        if not lost:
            continue
        example = repr(next(iter(lost))[:40])
        if refuse and all(unknown == total for unknown, total in counts.values()):
            raise DataError(
                f"the tokenizer has no token for the targets of {corpus.names[cell]}: each becomes nothing but "
                f"unknown tokens, such as {example}; take a model whose tokenizer knows them"
            )
        notes.append(
            f"the tokenizer turns parts of targets into unknown tokens, which the model cannot write: in {len(lost)} of "
            f"{len(counts)} targets of {corpus.names[cell]} that were looked at, such as {example}"
        )
    return notes
