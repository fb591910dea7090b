"""A Trainer that evaluates tasks by cell."""

from __future__ import annotations

from typing import Any

import torch

from flix.core.errors import TrainingError
from flix.core.progress import Silent
from flix.tasks.evaluation import Evaluator
from flix.transformers import FlixTrainer
from flix.transformers.journal import Journal


class TaskTrainer(FlixTrainer):
    """A Trainer whose rows come in the order of the dataset, and that evaluates as an :class:`Evaluator` does.

    Args:
        args, kwargs: FlixTrainer's.
        evaluator: the rows to evaluate on, and how.
        journal: written to at every evaluation.
        scoring: whether evaluations score answers, beside the losses.
    """

    def __init__(
        self,
        *args: Any,
        evaluator: Evaluator,
        journal: Journal,
        scoring: bool = False,
        **kwargs: Any,
    ) -> None:
        self.evaluator, self.journal, self.scoring = evaluator, journal, scoring
        super().__init__(*args, eval_dataset=evaluator.rows or None, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def losses_of(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of each row of a batch the sum of its losses, and what they count: float64 ``[rows, 2]``, on the CPU."""
        inputs = self._prepare_inputs(batch)
        model: Any = self.model
        with torch.no_grad(), self.compute_loss_context_manager():
            parts = self.row_losses(inputs, model(**inputs))
        if parts is None:
            raise TrainingError("the model's outputs tell no losses of rows")
        losses, counts = (part.reshape(len(part), -1).cpu().double() for part in parts)
        return torch.stack([torch.where(counts > 0, losses * counts, 0.0).sum(1), counts.sum(1)], 1)

    def summed(self, found: torch.Tensor) -> torch.Tensor:
        """A tensor summed over all processes."""
        if self.args.world_size == 1:
            return found
        whole: torch.Tensor = self.accelerator.reduce(found.to(self.args.device), reduction="sum")
        return whole.cpu()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Losses, and scores where they choose the best checkpoint or cost no more; logged and written."""
        found = self.evaluator.summary(self.evaluator.losses(self))
        if self.scoring:
            scored = self.evaluator.scored(self.evaluator.answers(self.model, Silent()))
            for cell in scored["cells"]:
                found["cells"][cell["cell"]]["score"] = cell["score"]
            found["scores"] = {k: scored[k]["score"] for k in ("seen", "held_out") if scored[k]}
        metrics = _metrics(found)
        if (best := self.args.metric_for_best_model) and metrics.get(f"eval_{best}") is None:
            raise TrainingError(
                f"the evaluation gives no {best}, by which the best adapter is chosen: no row of it has an answer"
            )
        self.log({k: v for k, v in metrics.items() if v is not None})
        self.journal.evaluated(self.state.global_step, found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # fmt: skip
        return metrics


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """What an evaluation found, under the names that the Trainer and its trackers know."""
    metrics = {
        "eval_loss": found["loss"],
        "eval_seen.loss": found["seen"],
        "eval_held_out.loss": found["held_out"],
    }
    for half, score in found.get("scores", {}).items():
        metrics[f"eval_{half}.score"] = score
        metrics.setdefault("eval_score", score)  # of the seen cells, if there are any
    metrics.update({f"eval_loss/{name}": loss for name, loss in found["by_feature"].items()})
    return metrics
