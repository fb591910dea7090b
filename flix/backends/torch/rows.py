"""Whose rows a layer's input holds: by the model's structure and earlier calls, not by a size that happens to fit.

A layer sees the batch in its first dimension (``[B, ...]``), one row for all (``[1, ...]``: position tables, a shared
image), or all tokens in one dimension (``[B * S]``). Layers that get tokens gathered from rows, and those that get the
sequence first, are marked in the model's state: from then on they are refused, whatever the sizes. Those that get
windows or frames, each row's in turn (``[B * windows, ...]``), are marked, too, where ``lineage`` has followed the rows
there; others of such sizes are refused. One composition for all rows is never in doubt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch.routing import ActiveRouting, AnyRouting, TracedRouting

MEDIA = "media"
GATHERED = "it gets tokens gathered from the batch's rows, as experts do"
TIME_FIRST = "its inputs have the sequence first, as its block says (batch_first=False)"
SEEN_TIME_FIRST = "its inputs have the sequence first, as a call showed"
SPREAD = "it gets parts of each row in turn, such as windows and frames"


def rows_of(
    layer: Any, x: Tensor, routing: AnyRouting, trailing: int
) -> tuple[Tensor, int, int, AnyRouting]:
    """An input with its leading dimensions fitted to the routing's rows.

    Args:
        layer: the adapted layer.
        x: ``[..., d_in]`` (trailing 1), or token ids ``[...]`` (trailing 0).
        routing: the routing in force.
        trailing: the number of dimensions of x that are not positions.

    Returns:
        x, the rows N, the positions S of each, and the routing of these rows.

    Raises:
        RoutingError: the leading dimensions are not the routing's, or whose they are is in doubt.
    """
    lead, given = routing.lead, tuple(x.shape[: x.dim() - trailing])
    mark = layer.flix_state.marks.get(layer.flix_place)
    if (watch := routing.watch) is not None:
        watch.called.add(layer.flix_place)
        watch.origins[layer.flix_place] = watch.lineage.origin(x)
        watch.of_batch[layer.flix_place] = watch.taken(x)
        if watch.origins[layer.flix_place] == MEDIA:
            layer.flix_state.media.update(_alike(layer))
        if mark is None and lead and watch.gathered(x):
            mark = _mark(layer, GATHERED)
        if mark is None and lead and watch.turned(x):
            mark = _mark(layer, SEEN_TIME_FIRST)
        if mark is None and len(lead) == 1 and len(given) > 1 and watch.spread(x):
            mark = _mark(layer, SPREAD)
    if routing.media is not None and layer.flix_place in layer.flix_state.media:
        _check_media(layer, routing)
    if given[: len(lead)] != lead or (mark is not None and lead):
        x, routing = _fitted(layer, x, given, routing, mark)
        given, lead = tuple(x.shape[: x.dim() - trailing]), routing.lead
    count = 1
    for size in lead:
        count *= size
    total = 1
    for size in given:
        total *= size
    return x, count, total // count if count else 0, routing


def _check_media(layer: Any, routing: ActiveRouting) -> None:
    media = routing.media
    if media is not None and media.without and routing.alone() is None:
        raise messages.unlike_media(layer.flix_name, media.kind, media.without, media.prompt)


def noted(layer: Any, y: Tensor, routing: AnyRouting) -> Tensor:
    """An adapted layer's output, whose rows are where the input's were, as a watched forward notes."""
    if (watch := routing.watch) is not None:
        if watch.of_batch.get(layer.flix_place):
            watch.take([y])
        if routing.lead:
            watch.lineage.made(y, watch.origins.get(layer.flix_place))
    return y


def _fitted(
    layer: Any, x: Tensor, given: tuple[int, ...], routing: AnyRouting, mark: str | None
) -> tuple[Tensor, AnyRouting]:
    """An input that is not plainly ``[B, ...]``, or whose layer is marked."""
    lead, length = routing.lead, routing.length
    fits = given[: len(lead)] == lead
    if mark == SPREAD and len(lead) == 1 and given and lead[0] and given[0] % lead[0] == 0:  # noqa: SIM102
        if fits or routing.watch is None or routing.watch.spread(x):
            return x, routing
    if mark is None and given[:1] + given[2:] == lead and given[1] == 1:
        return x, routing  # by token, with an axis of one for heads
    if mark is None and not fits:
        mark = _seen(layer, given, routing)
    if mark == GATHERED and fits and len(given) > 1 and given[1] == length:
        return x, routing  # every token of every row, as shared and dense experts get them
    if mark == SEEN_TIME_FIRST and fits and given[0] != given[1]:
        return x, routing
    # By token, other positions than the ids' are a mistake, unless the layer is known to get tokens as they come.
    known = mark is not None and (mark != SEEN_TIME_FIRST or given[:2] == lead[::-1])
    if routing.counted and (known or len(lead) == 1) and (one := routing.alone()) is not None:
        return x, one
    if mark in (None, SEEN_TIME_FIRST):
        if given[:1] == (1,) and given[1 : len(lead)] == lead[1:] and routing.batch == lead[0]:
            # One row for all: each row of the batch gets its own.
            if routing.watch is not None:
                routing.watch.origins[layer.flix_place] = layer
            return x.expand(lead[0], *x.shape[1:]), routing
        if len(given) == 1 and _flattened(given[0], routing):
            return x, routing
    if mark is not None and (fits or mark != SEEN_TIME_FIRST):
        raise messages.doubtful_rows(layer.flix_name, list(given), list(lead), mark)
    unseen = isinstance(routing, TracedRouting) and len(given) > 1
    raise messages.other_lead(layer.flix_name, list(given), list(lead), True, unseen)


def _flattened(tokens: int, routing: AnyRouting) -> bool:
    """Whether so many tokens are those of all rows, as models have them that flatten [B, S, d] to [B * S, d]."""
    lead = routing.lead
    return tokens == (lead[0] * lead[1] if len(lead) == 2 else lead[0] * (routing.length or -1))


def _seen(layer: Any, given: tuple[int, ...], routing: AnyRouting) -> str | None:
    """What an input that does not fit tells of its layer, if the batch's size is beyond doubt."""
    lead = routing.lead
    turned = len(lead) == 1 and len(given) > 1 and given[1] == lead[0] != 1 and given[0] != 1
    if turned and routing.counted:  # else the caller gave another number of rows
        return _mark(layer, SEEN_TIME_FIRST)
    certain = lead[0] > 1 and routing.batch == lead[0] and routing.length
    if certain and len(given) == 1 and given[0] != 1 and not _flattened(given[0], routing):
        return _mark(layer, GATHERED)
    return None


def _mark(layer: Any, mark: str) -> str:
    """Mark a layer, and those that differ from it in a number in their path alone."""
    layer.flix_state.marks.update((place, mark) for place in _alike(layer))
    return mark


def _alike(layer: Any) -> set[int]:
    """The places of a layer and of those that differ from it in a number in their path alone."""
    places, pattern = layer.flix_state.bank.layout.places, _pattern(layer.flix_name)
    return {place for path, place in places.items() if _pattern(path) == pattern} | {
        layer.flix_place
    }


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def known_marks(model: nn.Module, paths: Any) -> Iterator[tuple[str, str]]:
    """(path, mark) of the layers of which the model's structure tells what they get."""
    first = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        and not module.self_attn.batch_first
    }
    turned = {
        path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    for path in paths:
        parts = path.split(".")
        if path.rpartition(".")[0] in turned:
            continue  # it turns what its projections get
        if any("expert" in part.lower() and "shared" not in part.lower() for part in parts):
            yield path, GATHERED
        elif any(".".join(parts[:i]) in first for i in range(len(parts))):
            yield path, TIME_FIRST
