"""Mixed batches through real architectures equal a dense per-row composition, forward and backward."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import adapt  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    MODELS,
    batch,
    dense_model,
    live_pairs,
    make,
    output,
    randomize,
    routing,
)

TARGETS = {
    "linear": {},
    "embeddings": {
        "llama": ["q_proj", "embed_tokens"],
        "gpt2": ["c_attn", "wte", "wpe"],
        "bert": ["query", "word_embeddings", "position_embeddings"],
        "t5": ["q", "shared"],
    },
}


def _targets(name: str, kind: str) -> dict[str, object]:
    return {"target_modules": TARGETS[kind][name]} if kind == "embeddings" else {}


@pytest.mark.parametrize("strategy", ["gather", "masked", "auto"])
@pytest.mark.parametrize("kind", ["linear", "embeddings"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_batch_equals_dense_rows(name, dtype, kind, strategy):
    base = make(name, dtype)
    if kind == "embeddings" and hasattr(base, "tie_weights") and name in ("gpt2", "t5"):
        # The reference replaces parameters by name; a tied head would follow the embedding there.
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    adapted = adapt(copy.deepcopy(base), config(**_targets(name, kind)), strategy=strategy)
    randomize(adapted)
    ids, weights = routing()
    inputs = batch(name)
    expected, leaves, weight_leaf = dense_model(base, adapted, ids, weights, inputs)
    own_weights = weights.to(dtype).requires_grad_()
    found = output(adapted(**inputs, flix_features=ids, flix_weights=own_weights))
    assert_close(found, expected)
    assert_far(found, output(base(**inputs)))

    # One projection for both, so that a loss's own reduction plays no part.
    project = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (found * project).sum().backward()
    (expected * project).sum().backward()
    for pair_name, parameter in live_pairs(adapted).items():
        leaf = leaves[pair_name]
        if ".zul" in pair_name:
            assert parameter.grad is None, f"{pair_name} is absent from the batch"
        elif leaf.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), pair_name
        else:
            assert_close(parameter.grad, leaf.grad, name=pair_name)
    active = ids >= 0
    assert_close(own_weights.grad[active], weight_leaf.grad[active])


@pytest.mark.parametrize("name", MODELS)
def test_single_equals_the_others_and_refuses_mixed_rows(name):
    adapted = adapt(make(name), config(), strategy="gather")
    randomize(adapted)
    ids, weights = routing([ROWS[1]] * 3)
    inputs = batch(name, rows=3)
    gathered = output(adapted(**inputs, flix_features=ids, flix_weights=weights))
    project = torch.randn(gathered.shape, dtype=torch.float64)
    (gathered * project).sum().backward()
    grads = {n: p.grad.clone() for n, p in live_pairs(adapted).items() if p.grad is not None}
    adapted.zero_grad()
    for _, layer in flix_layers(adapted):
        layer.flix_strategy = "single"
    single = output(adapted(**inputs, flix_features=ids, flix_weights=weights))
    assert_close(single, gathered)
    (single * project).sum().backward()
    for n, p in live_pairs(adapted).items():
        assert (p.grad is None) == (n not in grads)
        if n in grads:
            assert_close(p.grad, grads[n])
    ids, weights = routing()
    with pytest.raises(ValueError, match="row 1 differs"):
        adapted(**batch(name), flix_features=ids, flix_weights=weights)
