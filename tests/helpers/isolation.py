"""Rows stay apart (docs/specification.md §1.5): what a broken feature, or a broken row, may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.tolerance import assert_close
from tests.helpers.torch import layer_pairs

BROKEN = ("language", "swa")
# hau with ner and pos, swa (which breaks) with pos, zul alone, hau with a weight of 0 for swa, nothing.
IDS = [[0, 4, 5], [1, 5, -1], [3, -1, -1], [0, 1, -1], [-1, -1, -1]]
WEIGHTS = [[1.0, 0.5, 2.0], [1.5, -1.0, 0.0], [0.5, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
USERS = [1]  # rows whose answers depend on BROKEN
SHARED = {("task", "pos")}  # features that a row with BROKEN uses: its gradients may reach them

WAYS = {  # (what A of the broken feature holds, B, the broken row's input)
    "nan in A": (float("nan"), None, None),
    "nan in B": (None, float("nan"), None),
    "inf": (float("inf"), float("-inf"), None),
    "overflow": (3e38, 3e38, None),
    "nan in x": (None, None, float("nan")),
    "inf in x": (None, None, float("inf")),
}


def run(
    layer: Any, call: Callable[..., Any], x: Any, learned: bool, used: list[int] = USERS
) -> dict[str, Any]:
    """The output of rows without the broken feature, and all gradients of a loss on those rows."""
    x = x.detach().clone()
    others = [i for i in range(len(IDS)) if i not in used]
    if x.is_floating_point():
        x.requires_grad_()
    weights = torch.tensor(WEIGHTS, device=x.device).requires_grad_(learned)
    layer.flix_state.bank.zero_grad()
    y = call(x, flix_features=torch.tensor(IDS), flix_weights=weights)
    part = y[others]
    (
        part * torch.linspace(-1, 1, part.shape[-1], device=x.device, dtype=part.dtype)
    ).sum().backward()
    found = {"y": part}
    if x.is_floating_point():
        found["x"] = x.grad[others]
    if learned:
        found["weights"] = weights.grad[others]
        found["weights"][2, 1] = 0  # of the broken feature itself
    for feature, pair in layer_pairs(layer).items():
        if feature != BROKEN and feature not in SHARED:
            for side, value in zip("AB", pair, strict=True):
                if value.grad is not None:
                    found[f"{side} {feature}"] = value.grad
    return {name: value.detach().clone() for name, value in found.items()}


def check(layer: Any, x: Any, way: str, *, learned: bool, call: Any = None) -> None:
    """Break a feature or a row, and hold all others to what they were."""
    a, b, row = WAYS[way]
    expected = run(layer, call or layer, x, learned)
    with torch.no_grad():
        for side, value in zip(layer_pairs(layer)[BROKEN], (a, b), strict=True):
            if value is not None:
                side.fill_(value)
        if row is not None and x.is_floating_point():
            x = x.clone()
            x[USERS] = row
    found = run(layer, call or layer, x, learned)
    assert {*expected} <= {*found}
    for name, value in expected.items():
        assert value.isfinite().all()
        assert_close(
            found[name],
            value,
            name=f"{way}: {name}",
            dtype=x.dtype if x.is_floating_point() else None,
        )
