"""A model of attention of torch's own, for tests."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix.backends.torch import (  # noqa: E402
    adapt,
    merge,
)
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.torch import randomize, routing  # noqa: E402

ROW = {"language": "swa", "task": "pos"}
N, L, S, D, HEADS = 4, 5, 6, 8, 2
IN, OUT = "attn.in_proj_weight", "attn.out_proj"


class Net(nn.Module):
    """An attention as a model has it."""

    def __init__(self, **settings):
        super().__init__()
        self.attn = nn.MultiheadAttention(D, HEADS, **settings)

    def forward(self, query, key, value, **how):
        return self.attn(query, key, value, **how)


def made(strategy="auto", targets="all-linear", **settings):
    torch.manual_seed(0)
    base = Net(**{"batch_first": True, **settings}).double().eval()
    for bias in (base.attn.in_proj_bias, base.attn.out_proj.bias):
        if bias is not None:  # torch begins with zeros
            nn.init.normal_(bias)
    model = adapt(copy.deepcopy(base), config(target_modules=targets), strategy=strategy)
    randomize(model, std=0.3)
    return base, model.eval()


def drawn(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(kind):
    """Queries, keys and values ``[N, ..., D]``: of one tensor, of two, of three."""
    if kind == "self":
        x = drawn(N, S, D)
        return x, x, x
    query, key = drawn(N, L, D), drawn(N, S, D, seed=2)
    return (query, key, key) if kind == "cross" else (query, key, drawn(N, S, D, seed=3))


def row_of(model, base, row):
    """The plain module under one row's features."""
    return merge(model, ROWS[row]) if ROWS[row] else base


def turned(x, batch_first):
    return x if batch_first else x.transpose(0, 1)


def run(model, given, how, batch_first=True, rows=ROWS):
    ids, weights = routing(rows)
    same = {id(x): turned(x, batch_first) for x in given}
    return model(*(same[id(x)] for x in given), **how, flix_features=ids, flix_weights=weights)
