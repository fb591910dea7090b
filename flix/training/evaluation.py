"""Evaluation by generation: exact match and chrF of every cell, averaged over seen and held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flix.core.adapter.composition import untrained, untrained_note
from flix.core.adapter.files import load_adapter
from flix.core.errors import FlixError
from flix.training.corpus import Corpus, Examples, build_corpus
from flix.training.errors import DataError, missing_extra
from flix.training.mixture import items
from flix.training.progress import Reporter
from flix.training.settings import Settings
from flix.training.sources import read_rows

if TYPE_CHECKING:
    from flix.training.batches import Collator


def evaluate(
    settings: Settings, adapter: str | Path, *, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Evaluate an adapter on the evaluation rows of a configuration.

    Args:
        settings: the configuration; what it trains on counts as seen, the rest as held out.
        adapter: the adapter's folder.
        reporter: told of progress.

    Returns:
        ``cells`` (cell, seen, rows, exact_match, chrf, samples), ``seen`` and ``held_out`` (averages over cells).

    Raises:
        FlixError: a mistake in settings, data, model or adapter; nothing to evaluate on.
    """
    reporter = reporter or Reporter()
    loaded = load_adapter(adapter)
    corpus = build_corpus(settings, read_rows(settings), loaded.config.registry, settings.unknown)
    if not len(corpus.evaluation):
        raise DataError(
            "nothing to evaluate on: give the datasets eval_files:, eval_split: or eval_rows:, or held_out cells"
        )
    try:
        import sacrebleu  # noqa: F401
        import torch

        from flix.backends.torch import load_into
    except ImportError as error:
        if isinstance(error, FlixError):
            raise
        raise missing_extra("evaluation", "train", error) from None
    from flix.training.batches import Collator, RoutingTable, Texts
    from flix.training.checking import unknown_targets
    from flix.training.models import load_model, load_tokenizer, locate

    t = settings.training
    if t.threads is not None:
        torch.set_num_threads(t.threads)
    name = locate(settings.model, settings.base_folder)
    own = settings.tokenizer
    tokenizer = load_tokenizer(locate(own, settings.base_folder) if own else name)
    model = load_into(load_model(name, settings.kind, t.dtype), loaded).eval()
    if t.device == "auto" and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    table = RoutingTable(corpus, settings.unknown, settings.evaluation.unseen_group_weights)
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = Texts(tokenizer, settings.kind, t.max_source_tokens, t.max_target_tokens, vocabulary)
    collator = Collator(
        texts, table, loaded.config, seed=settings.seed, batch_size=settings.evaluation.batch_size
    )
    used = {int(i) for i in table.ids[corpus.evaluation.combinations].ravel()}
    registry = loaded.config.registry
    if idle := [feature for feature in untrained(loaded) if registry.id(*feature) in used]:
        reporter.note(f"note: {untrained_note(idle)}")
    for text in unknown_targets(texts, corpus, corpus.evaluation, refuse=False):
        reporter.note(f"note: {text}")
    return score(model, settings, corpus, collator, reporter)


def score(
    model: Any, settings: Settings, corpus: Corpus, collator: Collator, reporter: Reporter
) -> dict[str, Any]:
    """Generate for the evaluation rows and score; see :func:`evaluate`."""
    e = settings.evaluation
    rows = limited(corpus.evaluation, e.limit)
    predictions = generate(model, rows, collator, e, reporter)
    cells = []
    for cell in np.unique(rows.cells).tolist():
        places = np.flatnonzero(rows.cells == cell).tolist()
        outputs = [predictions[i] for i in places]
        targets = [rows.rows[i].target for i in places]
        cells.append(
            {
                "cell": corpus.names[cell],
                "seen": bool(corpus.trained[cell]),
                "rows": len(places),
                **scores(outputs, targets),
                "samples": [
                    {"source": rows.rows[i].source, "target": rows.rows[i].target, "output": predictions[i]}
                    for i in places[: e.samples]
                ],
            }
        )  # fmt: skip
    return {
        "cells": cells,
        "seen": average([c for c in cells if c["seen"]]),
        "held_out": average([c for c in cells if not c["seen"]]),
    }


def limited(examples: Examples, limit: int | None) -> Examples:
    """The first ``limit`` rows of every cell."""
    if limit is None:
        return examples
    keep = np.zeros(len(examples), bool)
    for cell in np.unique(examples.cells).tolist():
        keep[np.flatnonzero(examples.cells == cell)[:limit]] = True
    return examples.select(keep)


def generate(
    model: Any, rows: Examples, collator: Collator, evaluation: Any, reporter: Reporter
) -> list[str]:
    """The model's answers, in the order of the rows; generated in batches of similar length."""
    import torch

    texts = collator.texts
    order = sorted(range(len(rows)), key=lambda i: len(rows.rows[i].prompt), reverse=True)
    everything = items(rows)
    answers: list[str] = [""] * len(rows)
    reporter.start("evaluating", len(rows))
    try:
        for start in range(0, len(order), evaluation.batch_size):
            part = order[start : start + evaluation.batch_size]
            batch = collator.prompts([everything[i] for i in part])
            batch = {key: value.to(model.device) for key, value in batch.items()}
            with torch.inference_mode():
                out = model.generate(
                    **batch,
                    max_new_tokens=evaluation.max_new_tokens,
                    num_beams=evaluation.num_beams,
                    do_sample=False,
                    pad_token_id=texts.pad,
                    eos_token_id=texts.end,
                )
            if texts.kind == "causal":
                out = out[:, batch["input_ids"].shape[1] :]
            decoded = texts.tokenizer.batch_decode(out, skip_special_tokens=True)
            for place, text in zip(part, decoded, strict=True):
                answers[place] = text.strip()
            reporter.advance(start + len(part))
    finally:
        reporter.stop()
    return answers


def scores(outputs: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Exact match and chrF, both in percent."""
    import sacrebleu

    wanted = [target.strip() for target in targets]
    right = sum(o == t for o, t in zip(outputs, wanted, strict=True))
    chrf = sacrebleu.corpus_chrf(list(outputs), [wanted]).score
    return {"exact_match": round(100.0 * right / len(wanted), 2), "chrf": round(float(chrf), 2)}


def average(cells: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean over cells, each counting once; None where there are none."""
    if not cells:
        return None
    return {
        "cells": len(cells),
        "rows": sum(cell["rows"] for cell in cells),
        "exact_match": round(float(np.mean([cell["exact_match"] for cell in cells])), 2),
        "chrf": round(float(np.mean([cell["chrf"] for cell in cells])), 2),
    }
