"""``flix evaluate``: an adapter on the evaluation rows of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flix.core.adapter.composition import untrained, untrained_note
from flix.core.adapter.files import load_adapter
from flix.core.progress import Reporter
from flix.tasks import composing
from flix.tasks.evaluation import Evaluator
from flix.tasks.needing import need
from flix.training.data import Data, read_data
from flix.training.errors import DataError
from flix.training.models import Built, build
from flix.training.settings import Settings


def evaluator_of(settings: Settings, data: Data, built: Built) -> Evaluator:
    """The rows that a configuration evaluates on, and how."""
    e = settings.evaluation
    return Evaluator(
        data.mixture.evaluation_rows(),
        built.tasks,
        built.collator,
        limit=e.limit,
        batch_size=e.batch_size,
        max_new_tokens=e.max_new_tokens,
        num_beams=e.num_beams,
        unseen_group_weights=e.unseen_group_weights,
        samples=e.samples,
        seed=settings.seed,
    )


def evaluate(
    settings: Settings,
    adapter: str | Path,
    *,
    compose: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Evaluate an adapter on the evaluation rows of a configuration.

    Args:
        settings: the configuration; cells that it trains on count as seen, the others as held out.
        adapter: the adapter's folder.
        compose: what cells that were never trained activate instead: ``language=off``, ``language=0.5``,
            ``language=parent:zul``, ``language=searched``.
        reporter: gets messages about progress.

    Returns:
        ``cells`` (each with its score, interval and other scores), ``seen`` and ``held_out`` (averages over cells),
        ``samples``, and ``searched`` (the combinations that a search found).

    Raises:
        FlixError: a mistake in settings, data, model or adapter; nothing to evaluate on.
    """

    reporter = reporter or Reporter()
    loaded = load_adapter(adapter)
    asked = composing.parse(compose, loaded.config.registry)
    data = read_data(settings, loaded.config.registry)
    if not len(data.mixture.evaluation_rows()):
        raise DataError(
            "nothing to evaluate on: give the datasets eval_files:, eval_split: or eval_rows:, or held-out cells"
        )
    need("evaluation")
    built = build(settings, data, loaded.config, adapter=loaded, folder=Path(adapter))
    evaluator = evaluator_of(settings, data, built)
    used = {loaded.config.registry.features[i] for i in np.unique(evaluator.ids).tolist() if i >= 0}
    if idle := [feature for feature in untrained(loaded) if feature in used]:
        reporter.note(f"note: {untrained_note(idle)}")
    for text in built.notes(
        evaluator.rows, [evaluator.names[c] for c in evaluator.cells], refuse=False
    ):
        reporter.note(f"note: {text}")
    searched = composing.apply(asked, evaluator, built.model)
    found = evaluator.answers(built.model, reporter)
    more = {"searched": searched} if searched else {}
    return {**evaluator.scored(found), "samples": evaluator.samples(found), **more}
