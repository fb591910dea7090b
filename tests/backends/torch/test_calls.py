"""What generation keeps between tokens, and the forms in which it takes routing.

That mixed batches generate what their rows do is tested over architectures, in tests/backends/torch/architectures.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix.backends.torch import adapt, trainable_parameters  # noqa: E402
from tests.helpers.registry import ROWS, config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    adapted,
    batch,
    make,
    randomize,
    routing,
)


def _model(name):
    model = adapt(make(name, torch.float32), config())
    randomize(model, std=0.3)
    return model.eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_routing_may_be_a_routing_an_array_or_a_list(beams):
    """Only tensors are repeated for beams; the rest is made one first."""
    model = _model("llama")
    prompt = batch("llama")["input_ids"]
    encoded = registry().encode(ROWS)
    ids, weights = routing()
    arguments = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    expected = model.generate(prompt, flix_features=ids, flix_weights=weights, **arguments)
    given = [
        {"flix_features": encoded},
        {"flix_features": encoded.ids, "flix_weights": encoded.weights},
        {"flix_features": encoded.ids.tolist(), "flix_weights": encoded.weights.tolist()},
        {"flix_features": ids, "flix_weights": encoded.weights},
    ]
    for form in given:
        assert torch.equal(model.generate(prompt, **form, **arguments), expected)
    plain = registry().encode([{"language": "hau"}] * len(ROWS))
    by_ids = model.generate(prompt, flix_features=torch.from_numpy(plain.ids), **arguments)
    assert torch.equal(model.generate(prompt, flix_features=plain, **arguments), by_ids)
    other = flix.FeatureRegistry({"language": ["hau"]}).encode([{"language": "hau"}] * 4)
    with pytest.raises(flix.RoutingError, match="encoded by another registry"):
        model.generate(prompt, flix_features=other, **arguments)


def test_the_plan_of_a_generation_is_made_once(monkeypatch):
    """Also with weights; changing them in place, or the ids, makes another."""
    from flix.backends.torch import routing as routings

    calls = []
    plan_union = routings.plan_union
    monkeypatch.setattr(
        routings, "plan_union", lambda *args: calls.append(args) or plan_union(*args)
    )
    model = _model("llama")
    ids, weights = routing()
    token = torch.full((len(ids), 1), 5)

    def logits():
        return model(token, flix_features=ids, flix_weights=weights).logits

    with torch.no_grad():
        before = logits()
        count = len(calls)
        assert torch.equal(logits(), before) and len(calls) == count > 0
        weights.mul_(2.0)
        after = logits()
        assert_far(after, before)
        assert len(calls) > count
        fresh = model(token, flix_features=ids.clone(), flix_weights=weights.clone()).logits
        assert_close(after, fresh)
        ids.copy_(ids[np.arange(len(ids))[::-1].copy()])
        assert_far(logits(), after)


def test_per_token_routing_generates_on_under_the_last_tokens_features():
    model = _model("llama")
    ids, _ = routing([ROWS[0]] * 2)
    prompt = batch("llama", rows=2)["input_ids"]
    per_token = ids[:, None, :].expand(2, prompt.shape[1], ids.shape[1]).contiguous()
    arguments = {"max_new_tokens": 5, "do_sample": False}
    by_row = model.generate(prompt, flix_features=ids, **arguments)
    by_token = model.generate(prompt, flix_features=per_token, **arguments)
    assert torch.equal(by_row, by_token)


def test_a_fused_step_between_tokens_is_seen():
    """What is kept between tokens must not outlive an optimizer that changes parameters without counting it."""
    torch.manual_seed(0)
    model = _model("llama")
    ids, _ = routing()
    token = torch.full((len(ids), 1), 5)
    optimizer = torch.optim.AdamW(trainable_parameters(model), 0.1, fused=True)
    with torch.no_grad():
        before = model(token, flix_features=ids).logits
    model.train()
    model(token, flix_features=ids).logits.square().sum().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(token, flix_features=ids).logits
        fresh = model(token, flix_features=ids.clone()).logits
    assert_close(after, fresh)
    assert_far(after, before)


def test_a_token_in_another_precision_has_a_union_of_its_own():
    model = _model("llama")
    ids, _ = routing()
    token = torch.full((len(ids), 1), 5)
    with torch.no_grad():
        full = model(token, flix_features=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(token, flix_features=ids).logits
        again = model(token, flix_features=ids).logits
    assert torch.equal(full, again)
    assert_close(half, full, times=3)


def test_a_batch_of_another_size_is_named():
    model = adapted()
    ids, _ = routing()
    for inputs in (batch("llama", rows=3), {"inputs_embeds": torch.zeros(3, 9, 16).double()}):
        with pytest.raises(flix.RoutingError, match="routes 4 rows, but the batch has 3 rows"):
            model(**inputs, flix_features=ids)
    with pytest.raises(flix.RoutingError, match="weights belong to ids"):
        model(**batch("llama"), flix_weights=torch.ones(4, 2))
