"""Whisper's generation, which cuts and repeats the rows of a batch by itself.

What: long audio is decoded piece by piece, with the rows that are not at their end; pieces that came out badly are
decoded again at other temperatures, alone; several sequences a row repeat it before anything runs; the language is
found by a call of its own. The routed class of such a model gives each of these calls the routing of the rows that are
left. When: with the class (see ``models``). Undone: with it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from flix.backends.torch.routing import activated, make_routing

_FALLBACK = "generate_with_fallback"


class _Left:
    """The rows of one piece that are still to be decoded.

    Attributes:
        ids, weights: the routing of the piece's rows.
        rows: which of them the next call decodes.
        again: of those, which came out badly.
    """

    def __init__(self, ids: Tensor, weights: Tensor | None) -> None:
        self.ids, self.weights = ids, weights
        self.rows = list(range(len(ids)))
        self.again: set[int] | None = None

    def next(self, count: int) -> dict[str, Any]:
        """The routing of the next call, which has ``count`` rows: static caches pad them."""
        if self.again is not None:
            self.rows = [row for place, row in enumerate(self.rows) if place in self.again]
        self.again = set()
        ids = self.ids[self.rows]
        weights = None if self.weights is None else self.weights[self.rows]
        if more := count - len(ids):
            ids = torch.cat([ids, ids.new_full((more, *ids.shape[1:]), -1)])
            if weights is not None:
                weights = torch.cat([weights, weights.new_zeros(more, *weights.shape[1:])])
        return {"flix_features": ids, "flix_weights": weights}


_left: ContextVar[_Left | None] = ContextVar("flix_left", default=None)


def members_of(base: Any) -> dict[str, Any]:
    """What the routed class of a model overrides; nothing where its generation leaves rows alone."""
    if not hasattr(base, _FALLBACK):
        return {}

    def generate_with_fallback(self: Any, *args: Any, **given: Any) -> Any:
        kwargs = given.get("kwargs", {})
        ids = kwargs.get("flix_features")
        if ids is None:
            return base.generate_with_fallback(self, *args, **given)
        rows = torch.tensor(given["batch_idx_map"]) // (len(given["seek"]) // len(ids))
        weights = kwargs.get("flix_weights")
        left = _Left(ids[rows], None if weights is None else weights[rows])
        # What hears whether there is speech keeps the tensors among the keywords.
        kept = {key: value for key, value in kwargs.items() if key != "flix_weights"}
        given["kwargs"] = kept | {"flix_features": left.ids}
        if left.weights is not None:
            given["kwargs"]["flix_weights"] = left.weights
        token = _left.set(left)
        try:
            return base.generate_with_fallback(self, *args, **given)
        finally:
            _left.reset(token)

    def _need_fallback(self: Any, sequence: Any, outputs: Any, index: int, *args: Any) -> Any:
        found = base._need_fallback(self, sequence, outputs, index, *args)
        left = _left.get()
        if left is not None and left.again is not None and found[0]:
            left.again.add(index)
        return found

    def _prepare_generation_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        left = _left.get()
        if left is not None and kwargs.get("flix_features") is not None:
            kwargs |= left.next(len(kwargs["decoder_input_ids"]))
        return base._prepare_generation_config(self, *args, **kwargs)

    def _retrieve_init_tokens(self: Any, *args: Any, **given: Any) -> Any:
        kwargs = given.get("kwargs", {})
        ids = kwargs.get("flix_features")
        if ids is None:
            return base._retrieve_init_tokens(self, *args, **given)
        state = self.flix_state
        routing = make_routing(
            state.config.registry, ids, kwargs.get("flix_weights"), batch=len(ids)
        )
        with activated(routing.enter(state)):  # where it looks for the language
            return base._retrieve_init_tokens(self, *args, **given)

    made = (generate_with_fallback, _need_fallback, _prepare_generation_config, _retrieve_init_tokens)  # fmt: skip
    return {function.__name__: function for function in made}
