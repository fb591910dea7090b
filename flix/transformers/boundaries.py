"""Whether a model keeps packed texts apart: it is tried, since models differ and say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flix.core.errors import ConfigError

_LENGTH = 4
"""Tokens of each of the two texts that are tried."""
_LEAK = 1e-3
"""What a first text may change in the second's logits, over their spread: nothing is right, and rounding is less."""


class BoundaryCheck:
    """Tries a model with the first packed batch of a run, once: batches with ``position_ids`` and no attention mask."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> None:
        """See :func:`check_boundaries`."""
        if self.done or batch.get("attention_mask") is not None:
            return
        positions = batch.get("position_ids")
        if not isinstance(positions, Tensor) or not isinstance(batch.get("input_ids"), Tensor):
            return
        # Several processes try it together, whatever their rows are: a forward may wait for the others'.
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if alone and not bool((positions[..., 1:] == 0).any()):
            return  # one text a row
        check_boundaries(model, batch)
        self.done = True


@torch.no_grad()
def check_boundaries(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model in which a packed text sees the one before it.

    Two texts stand in one row, told apart by ``position_ids`` alone; then the first one is changed. The second one's
    logits must stay. The model is left as it was, and no random number is drawn.

    Args:
        model: an adapted causal model.
        batch: a packed one, of which tokens and features are taken.

    Raises:
        ConfigError: it does not read where texts begin.
    """
    tokens = batch["input_ids"].flatten()[:1].repeat(2 * _LENGTH)
    size = model.get_input_embeddings().weight.shape[0]
    tokens = (tokens + torch.arange(2 * _LENGTH, device=tokens.device)) % size
    other = torch.where(
        torch.arange(2 * _LENGTH, device=tokens.device) < _LENGTH, (tokens + _LENGTH) % size, tokens
    )
    positions = torch.arange(_LENGTH, device=tokens.device).repeat(2)[None]
    given = {
        name: batch[name][:1, :1].expand(1, 2 * _LENGTH, -1)
        for name in ("flix_features", "flix_weights")
        if isinstance(batch.get(name), Tensor) and batch[name].dim() == 3
    }
    if not given:
        return
    training = model.training
    model.eval()
    try:
        found = [
            model(input_ids=ids[None], position_ids=positions, **given).logits[:, _LENGTH:].float()
            for ids in (tokens, other)
        ]
    except TypeError as error:
        raise _refused(model, f"its forward takes no position_ids ({error})") from None
    finally:
        model.train(training)
    change = float((found[0] - found[1]).abs().max() / found[0].std().clamp(min=1e-12))
    if not change <= _LEAK:
        raise _refused(
            model, f"another text before it changed a text's logits by {change:.2g} of their spread"
        )


def _refused(model: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} does not keep packed texts apart: {why}. Such models do not read from position_ids where "
        "texts begin; train it without packing"
    )
