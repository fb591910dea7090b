"""What is done feature by feature in training: losses, and clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch.patches.models import RoutedModel
from flix.core.errors import RoutingError, listed
from flix.core.features.names import Feature, written
from flix.core.features.owners import Owners, per_feature, positive, row_owners
from flix.core.features.routing import Routing, as_array
from flix.core.features.table import FeatureTable


def losses_by_feature(
    losses: Tensor,
    features: Any,
    group: str,
    *,
    counts: Tensor | None = None,
    registry: FeatureTable | None = None,
) -> dict[str, Tensor]:
    """The mean loss of each feature of a group over its own rows, which is the loss that it would have alone::

        tokens = F.cross_entropy(logits.mT, labels, reduction="none")  # [batch, length], 0 at labels of -100
        means = losses_by_feature(tokens, routing, "tenant", counts=labels != -100)
        sum(means.values()).backward()

    The gradient of a row goes to its own feature, divided by that feature's count, so the number of rows that others
    have in the batch changes nothing. Losses that are not finite stay with their feature.

    Args:
        losses: ``[batch]`` or ``[batch, length]``, before any mean.
        features: a :class:`flix.Routing`, or ids ``[batch, width]`` or ``[batch, length, width]``.
        group: the group; each row names one of its features, or none, in which case it counts for nobody.
        counts: how much each loss counts, of the shape of ``losses``; default: 1 each.
        registry: the registry of the ids, if ``features`` is not a Routing.

    Returns:
        A scalar for each feature's name, in the order of ids. Features for which nothing counts are left out.

    Raises:
        FeatureError: no such group.
        RoutingError: losses and routing of different batches, or a row that names two features of the group.
    """
    owners = owners_of(features, group, registry)
    return means_by_owner(losses, owners, counts)


def owners_of(features: Any, group: str, registry: FeatureTable | None) -> Owners:
    """Whose each row of a call's routing is."""
    if isinstance(features, Routing):
        return row_owners(features.ids, features.registry, group)
    if registry is None:
        raise RoutingError(
            "ids alone do not say to which registry they belong: give "
            "registry=model.flix_config.registry, or a Routing "
            "(registry.encode(rows))"
        )
    if isinstance(features, Tensor):
        features = features.detach().cpu()
    return row_owners(as_array("flix_features", features), registry, group)


def means_by_owner(losses: Tensor, owners: Owners, counts: Tensor | None) -> dict[str, Tensor]:
    """See :func:`losses_by_feature`."""
    if losses.dim() == 0 or len(losses) != len(owners.slots):
        raise RoutingError(
            f"losses must have an entry for each row, [{len(owners.slots)}] or [{len(owners.slots)}, length], "
            f"got {list(losses.shape)}; take them before any mean (reduction='none')"
        )
    given = counts is not None
    if counts is None:
        counts = torch.ones_like(losses)
    elif counts.shape != losses.shape:
        raise RoutingError(
            f"counts must have the shape of losses, {list(losses.shape)}, got {list(counts.shape)}"
        )
    counts = counts.to(losses.device, losses.dtype)
    # Selected, not multiplied: 0 times what is not finite is NaN.
    kept = torch.where(counts != 0, losses * counts, 0.0)
    slots = torch.from_numpy(owners.slots).to(losses.device)
    some = len(owners.ids) + 1
    rows = torch.stack([kept.reshape(len(kept), -1).sum(1), counts.reshape(len(kept), -1).sum(1)])
    sums, totals = rows.new_zeros(2, some).index_add(1, slots, rows)
    # Without counts none is 0, and nobody need wait for the device to tell.
    known = totals.tolist() if given else [1.0] * some
    found = zip(owners.features, sums.unbind(), totals.unbind(), known, strict=False)
    return {feature[1]: value / count for feature, value, count, some in found if some}


MaxNorm = float | Mapping[Any, float]


def clip_grad_norm_by_feature_(
    model: nn.Module,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> dict[Feature, Tensor]:
    """Clip the gradient of each feature by its own norm, in place.

    A gradient that is large or not finite changes no other feature's gradient. Parameters of the base stay as they
    are.

    Args:
        model: an adapted model, after the backward.
        max_norm: the largest norm, for all features, or by ``(group, name)`` or group; features that a mapping leaves
            out are not clipped.
        norm_type: the norm's order; ``math.inf`` for the largest entry.
        error_if_nonfinite: raise an error if a norm is not finite; nothing is clipped then.

    Returns:
        The norms before clipping by feature, as scalars on the gradients' devices, for features that have a gradient.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: an unknown feature or group, or a norm that is not positive.
        RuntimeError: norms are not finite, if you asked for this error; it names the features.
    """
    if not isinstance(model, RoutedModel):
        raise messages.not_adapted("clip_grad_norm_by_feature_", model)
    bank, registry = model.flix_state.bank, model.flix_config.registry
    limits = per_feature("max_norm", max_norm, registry, positive)
    found = {bank.features[i]: p.grad for i, p in bank.held().items() if p.grad is not None}
    norms = {f: torch.linalg.vector_norm(grad, norm_type) for f, grad in found.items()}
    if error_if_nonfinite:
        odd = [written(f) for f, norm in norms.items() if not math.isfinite(norm.item())]
        if odd:
            raise RuntimeError(
                f"the gradients of {listed(odd)} are not finite, and were not clipped"
            )
    for feature, grad in found.items():
        if feature in limits:
            scale_to(grad, norms[feature], limits[feature])
    return norms


def scale_to(grad: Tensor, norm: Tensor, limit: float) -> None:
    """Scale a gradient to a norm, in place, as torch does: never up."""
    grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0).to(grad.dtype))
