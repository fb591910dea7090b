"""The loss by feature: from the logits of the forward that was run anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flix.core.features.names import written
from flix.core.features.registry import FeatureRegistry
from flix.core.sampling.packing import IGNORED


@torch.no_grad()
def unreduced(
    logits: Tensor, labels: Tensor, *, shifted: bool, problem_type: str | None = None
) -> tuple[Tensor, Tensor] | None:
    """The loss of every label, before any mean.

    Args:
        logits: ``[batch, length, classes]`` or ``[batch, classes]``.
        labels: integer ``[batch, length]`` or ``[batch]`` (-100 counts for nothing), or float for regression and
            multi-label classification.
        shifted: whether position t is compared with label t + 1, as causal language models do.
        problem_type: the model configuration's, if it has one.

    Returns:
        The losses, and how much each counts, both ``[batch, length]`` (``length - 1`` if shifted) or ``[batch]``; None
        where shapes and dtypes tell of none of these.
    """
    kind = problem_type
    if kind is None or (labels.dim() > 1 and not labels.is_floating_point()):
        several = labels.dim() == 2 and labels.shape == logits.shape and labels.shape[1] > 1
        kind = "multi_label_classification" if several else "regression"
        if not labels.is_floating_point():
            kind = "single_label_classification"
    if kind == "single_label_classification":
        return _cross_entropies(logits, labels, shifted)
    if labels.numel() != logits.numel() or len(labels) != len(logits):
        return None
    guess, wanted = logits.float().reshape(len(labels), -1), labels.float().reshape(len(labels), -1)
    if kind == "regression":
        losses = F.mse_loss(guess, wanted, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(guess, wanted, reduction="none")
    losses = losses.mean(1)
    return losses, torch.ones_like(losses)


def _cross_entropies(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor] | None:
    if labels.shape != logits.shape[:-1] or labels.dim() not in (1, 2):
        return None
    if shifted and labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = (labels != IGNORED).float()
    if labels.dim() == 1 or not len(labels):
        flat = logits.float().reshape(-1, logits.shape[-1])
        losses = F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none")
        return losses.reshape(labels.shape), counts
    # Row by row: the log-probabilities of a whole batch, in float32, might not fit.
    losses = torch.stack(
        [
            F.cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="none")
            for row, wanted in zip(logits, labels, strict=True)
        ]
    )
    return losses, counts


def by_items(loss: Tensor, losses: Tensor, counts: Tensor, items: Any, processes: int) -> Tensor:
    """A training loss as the Trainer takes it: divided by the labels of the whole step, times the processes.

    The Trainer tells models how many labels a step has, and takes every forward with ``**kwargs`` for one that divides
    by them. Some (T5's) return their micro-batch's mean: with accumulation, or several processes, its steps would be as
    many times too large, and rows of short answers would count for more than they do in one batch.

    Args:
        loss: the model's, times ``processes``.
        losses, counts: as :func:`unreduced` gives them.
        items: the labels of the step, over all micro-batches and processes.
        processes: over how many the Trainer averages.
    """
    with torch.no_grad():
        total = counts.sum()
        mean = torch.where(counts > 0, losses * counts, 0.0).sum() / total.clamp(min=1.0)
        plain = (loss.detach() / processes - mean).abs() <= 0.01 * mean.abs()
        factor = torch.where(plain, total / items, 1.0)
    return loss * factor.to(loss.dtype)


class FeatureLosses:
    """Sums of losses and counts by feature, kept on the device until they are asked for.

    A row's loss counts for every feature that acted in it: dropped features, and weights of 0, do not.
    """

    def __init__(self, registry: FeatureRegistry) -> None:
        self.registry = registry
        self.totals: Tensor | None = None

    @torch.no_grad()
    def add(self, losses: Tensor, counts: Tensor, ids: Tensor, weights: Tensor | None) -> bool:
        """Count one batch.

        Args:
            losses: ``[batch]`` or ``[batch, length]``.
            counts: of that shape, 0 where a loss does not count.
            ids: ``[batch, width]`` or ``[batch, length, width]``; positions beyond the losses' are left out.
            weights: of that shape, or None.

        Returns:
            Whether the shapes fit together.
        """
        if ids.dim() == 3:
            if losses.dim() != 2 or not 0 <= ids.shape[1] - losses.shape[1] <= 1:
                return False
            length, width = losses.shape[1], ids.shape[2]
            ids = ids[:, :length].reshape(-1, width)
            weights = None if weights is None else weights[:, :length].reshape(-1, width)
            losses, counts = losses.reshape(-1, 1), counts.reshape(-1, 1)
        if len(losses) != len(ids):
            return False
        losses, counts = losses.to(ids.device), counts.to(ids.device)
        wide = torch.float32 if ids.device.type == "mps" else torch.float64
        # Not with -1: a process may be left without a row, at the end of an evaluation.
        shape = (len(ids), losses[:1].numel())
        parts = (torch.where(counts > 0, losses * counts, 0.0), counts)
        sums = torch.stack([part.to(wide).reshape(shape).sum(1) for part in parts])
        features = len(self.registry)
        acts = ids >= 0 if weights is None else (ids >= 0) & (weights != 0)
        slot = torch.where(acts, ids, features).to(torch.int64)
        if self.totals is None or self.totals.device != ids.device:
            fresh = torch.zeros(2, features + 1, dtype=wide, device=ids.device)
            self.totals = fresh if self.totals is None else fresh + self.totals.to(fresh)
        for column in range(ids.shape[1]):
            self.totals.index_add_(1, slot[:, column], sums)
        return True

    def take(self, device: Any, reduce: Any = None) -> dict[str, float]:
        """The mean loss of each feature that acted, as ``{"group=feature": loss}``, and begin anew.

        Args:
            device: where the sums of a process that has none are made.
            reduce: sums a tensor over all processes; every process must then call this.
        """
        totals = self.totals
        self.totals = None
        if totals is None:
            wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
            totals = torch.zeros(2, len(self.registry) + 1, dtype=wide, device=device)
        if reduce is not None:
            totals = reduce(totals)
        sums, counts = totals[:, :-1].tolist()
        return {
            written(feature): loss / count
            for feature, loss, count in zip(self.registry.features, sums, counts, strict=True)
            if count
        }
