"""Rules that give each feature its rank (docs/specification.md §3).

Each function returns a rule; ``rule(registry)`` gives ``{(group, feature): rank}``. Lin et al. (arXiv 2402.17934,
§3) give every feature a rank of its own; how a budget is shared out is our choice.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flix.core.checks import finite, is_whole, whole
from flix.core.errors import RankError, listed, shown
from flix.core.features.encoding import Row
from flix.core.features.names import Feature, normal, normal_group, written
from flix.core.features.registry import FeatureRegistry

Ranks = dict[Feature, int]
Rule = Callable[[FeatureRegistry], Ranks]
ByFeature = Mapping[Any, Any]
"""Values by feature: ``{(group, feature): value}``, ``{group: {feature: value}}``, ``{"group=feature": value}`` or
``{group: value}``, which may be mixed."""


def uniform(rank: int) -> Rule:
    """The same rank for every feature."""
    rank = whole(rank, "uniform rank", 0, RankError)
    return lambda registry: dict.fromkeys(registry.live, rank)


def by_group(**ranks: int) -> Rule:
    """One rank for all features of a group; every group of the registry must be named."""
    for group, rank in ranks.items():
        whole(rank, f"rank of group {group!r}", 0, RankError)
    return lambda registry: _complete(registry, ranks, "by_group")


def explicit(ranks: ByFeature) -> Rule:
    """A rank for every feature: ``{(group, feature): rank}`` or ``{group: {feature: rank}}``."""
    return lambda registry: _complete(registry, ranks, "explicit")


def proportional(
    *,
    budget: int,
    sizes: ByFeature,
    temperature: float = 2.0,
    minimum: int = 1,
    maximum: int = 64,
) -> Rule:
    """Ranks in proportion to ``size ** (1 / temperature)``, within bounds, that sum to ``budget`` exactly.

    The budget is divided by Webster's divisor method. A feature with more data than another never has less rank, more
    data for a feature never lowers its rank, and a larger budget never lowers any rank.

    Args:
        budget: the sum of all ranks.
        sizes: the number of training examples of every feature.
        temperature: 1 follows the sizes, larger values level them out.
        minimum: the least rank of a feature.
        maximum: the largest rank of a feature.

    Raises:
        RankError: a value out of range; when the rule is applied, a feature without a size, or a budget that the
            bounds cannot meet (the message gives the smallest, or largest, feasible one).
    """
    whole(budget, "budget", 0, RankError)
    low, high = whole(minimum, "minimum", 0, RankError), whole(maximum, "maximum", 0, RankError)
    if low > high:
        raise RankError(f"minimum must not exceed maximum, got {low} and {high}")
    temperature = finite(temperature, "temperature", RankError, positive=True)

    def rule(registry: FeatureRegistry) -> Ranks:
        size = by_feature(registry, sizes, "sizes")
        if missing := [f for f in registry.live if f not in size]:
            raise RankError(
                f"sizes must name every feature; missing: {listed(map(written, missing))}"
            )
        for feature, n in size.items():
            if finite(n, f"the size of {written(feature)}", RankError) < 0:
                raise RankError(f"the size of {written(feature)} must be 0 or more, got {n!r}")
        count = len(registry.live)
        if budget < low * count:
            raise RankError(
                f"a budget of {budget} is infeasible: {count} features of rank {low} or more need at "
                f"least {low * count}, the smallest feasible budget"
            )
        if budget > high * count:
            raise RankError(
                f"a budget of {budget} is infeasible: {count} features of rank {high} or less take at "
                f"most {high * count}, the largest feasible budget"
            )
        # Sizes are divided by the largest first, so that no power overflows.
        top = max(max(size.values()), 1)
        claim = {f: (size[f] / top) ** (1.0 / temperature) for f in registry.live}
        ranks = dict.fromkeys(registry.live, low)
        queue = [
            (-claim[f] / (low + 0.5), -size[f], i, f)
            for i, f in enumerate(registry.live)
            if low < high
        ]
        heapq.heapify(queue)
        for _ in range(budget - low * count):
            _, _, i, f = heapq.heappop(queue)
            ranks[f] += 1
            if ranks[f] < high:
                heapq.heappush(queue, (-claim[f] / (ranks[f] + 0.5), -size[f], i, f))
        return ranks

    return rule


def compute_matched(*, lora_rank: int, datasets: Sequence[Row]) -> Rule:
    """The largest ranks for which no dataset's active ranks sum to more than ``lora_rank``.

    The arithmetic of a dataset's rows is then at most that of one LoRA of this rank (the comparison of Lin et
    al.). Ranks are raised in turn, group after group, while every dataset has room (max-min fair). A feature that
    no dataset uses gets the least rank of its group.

    Args:
        lora_rank: the rank to match.
        datasets: the features of each dataset, as rows for :meth:`FeatureRegistry.encode`.

    Raises:
        RankError: when applied: no dataset, or a dataset with more active features than ``lora_rank``.
    """
    whole(lora_rank, "lora_rank", 1, RankError)
    rows = [dict(row) for row in datasets]
    if not rows:
        raise RankError("compute_matched needs at least one dataset, got none")

    def rule(registry: FeatureRegistry) -> Ranks:
        active = [[int(i) for i in ids if i >= 0] for ids in registry.encode(rows).ids]
        fullest = max(range(len(rows)), key=lambda n: len(active[n]))
        if len(active[fullest]) > lora_rank:
            raise RankError(
                f"lora_rank={lora_rank} is infeasible: dataset {fullest} ({rows[fullest]}) activates "
                f"{len(active[fullest])} features of rank 1 or more; the smallest feasible lora_rank "
                f"is {len(active[fullest])}"
            )
        users: list[list[int]] = [[] for _ in registry.features]
        for number, ids in enumerate(active):
            for i in ids:
                users[i].append(number)
        room = [lora_rank] * len(rows)
        ranks = [0] * len(registry)
        order = [i for group in registry.groups for i in registry.ids_of(group) if users[i]]
        while growing := [i for i in order if all(room[n] > 0 for n in users[i])]:
            # As many turns at once as every dataset surely has room for; then one in which some may run out of it.
            taken = [0] * len(rows)
            for n in (n for i in growing for n in users[i]):
                taken[n] += 1
            turns = min(have // each for have, each in zip(room, taken, strict=True) if each)
            for several in (turns, 1):
                for i in growing:
                    if all(room[n] >= several for n in users[i]):
                        ranks[i] += several
                        for n in users[i]:
                            room[n] -= several
        for group in registry.groups:
            used = [ranks[i] for i in registry.ids_of(group) if users[i]]
            for i in registry.ids_of(group):
                if not users[i]:
                    ranks[i] = min(used, default=1)
        return {f: ranks[registry.id(*f)] for f in registry.live}

    return rule


def parameter_matched(*, lora_rank: int) -> Rule:
    """Equal ranks that sum to ``lora_rank``, so that together they have the parameters of one LoRA of this rank.

    A remainder goes to the features with the lowest ids.

    Raises:
        RankError: when applied: more features than ``lora_rank`` (the message says the smallest feasible one).
    """
    whole(lora_rank, "lora_rank", 1, RankError)

    def rule(registry: FeatureRegistry) -> Ranks:
        count = len(registry.live)
        if count > lora_rank:
            raise RankError(
                f"lora_rank={lora_rank} is infeasible: {count} features of rank 1 or more need at least "
                f"{count}, the smallest feasible lora_rank"
            )
        share, rest = divmod(lora_rank, count)
        return {f: share + (i < rest) for i, f in enumerate(registry.live)}

    return rule


def applied(rule: Callable[[FeatureRegistry], Any], registry: FeatureRegistry) -> Any:
    """What a rule says of a registry: ranks, or one rank.

    Raises:
        RankError: it cannot be called with a registry alone, or gives something else. Often it makes rules, and was
            not called.
    """
    name = getattr(rule, "__name__", repr(rule))
    asked = (
        f"a rank rule is called with the registry and returns {{(group, feature): rank}}; {name}"
    )
    call = f"; if it makes rules, call it first: ranks={name}(...)" if name.isidentifier() else ""
    try:
        signature = inspect.signature(rule)
    except ValueError:  # written in C, without a signature to read: what it raises itself has to do
        signature = None
    try:
        found = rule(registry) if signature is None else signature.bind(registry)
    except TypeError as error:
        raise RankError(f"{asked} does not accept that ({error}){call}") from error
    if signature is not None:
        found = rule(registry)  # a TypeError from inside it is its own
    if not isinstance(found, Mapping) and not is_whole(found):
        raise RankError(f"{asked} returned {shown(found)}{call}")
    return found


def by_feature(registry: FeatureRegistry, values: ByFeature, what: str) -> dict[Feature, Any]:
    """Values by feature, from any of the accepted forms; unknown names are refused.

    Raises:
        FeatureError: an unknown group or feature.
        RankError: a form that is none of the accepted ones, or a feature that is given twice.
    """
    if not isinstance(values, Mapping):
        raise RankError(f"{what} must be a mapping by feature or by group, got {shown(values)}")
    single: dict[int, Any] = {}
    shared: dict[str, Any] = {}

    def put(group: str, name: str, value: Any) -> None:
        i = registry.id(group, name)
        if i in single:
            raise RankError(f"{what} give {written(registry.features[i])} twice")
        single[i] = value

    for key, value in values.items():
        if isinstance(key, tuple) and len(key) == 2:
            put(*key, value)
        elif isinstance(value, Mapping):
            registry.ids_of(key)
            for name, inner in value.items():
                put(key, name, inner)
        elif feature := _named(registry, key):
            put(*feature, value)
        else:
            registry.ids_of(key)
            group = normal_group(key)
            if group in shared:
                raise RankError(f"{what} give the group {group!r} twice, in two Unicode forms")
            shared[group] = value
    found = {registry.features[i]: value for i, value in single.items()}
    for group, value in shared.items():
        for i in registry.ids_of(group):
            found.setdefault(registry.features[i], value)
    return found


def _named(registry: FeatureRegistry, key: object) -> Feature | None:
    """The feature of a key such as ``"language=hau"``; None for the name of a group."""
    if not isinstance(key, str) or "=" not in key or normal(key, "a group") in registry.groups:
        return None
    group, _, name = key.partition("=")
    return group.strip(), name.strip()


def _complete(registry: FeatureRegistry, ranks: ByFeature, what: str) -> Ranks:
    found = by_feature(registry, ranks, f"{what} ranks")
    if missing := [f for f in registry.live if f not in found]:
        raise RankError(
            f"{what} ranks must cover every feature; missing: {listed(map(written, missing))}"
        )
    return {f: whole(found[f], f"the rank of {written(f)}", 0, RankError) for f in registry.live}


__all__ = [
    "Ranks",
    "Rule",
    "by_group",
    "compute_matched",
    "explicit",
    "parameter_matched",
    "proportional",
    "uniform",
]
