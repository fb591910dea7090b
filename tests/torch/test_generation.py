"""Mixed-batch generation equals row-by-row generation."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import adapt, trainable_parameters  # noqa: E402

from .conftest import ROWS, batch, config, make, randomize, routing  # noqa: E402

WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "without cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def _model(name):
    model = adapt(make(name, torch.float32), config())
    randomize(model, std=0.3)
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_mixed_batch_equals_row_by_row(name, way):
    model = _model(name)
    ids, weights = routing()
    prompt = batch(name)["input_ids"]
    arguments = {"max_new_tokens": 6, **WAYS[way]}

    def run(part):
        return model.generate(
            input_ids=prompt[part],
            attention_mask=torch.ones_like(prompt[part]),
            flix_features=ids[part],
            flix_weights=weights[part],
            **arguments,
        )

    mixed = run(slice(None))
    rows = torch.cat([run(slice(i, i + 1)) for i in range(len(ROWS))])
    assert torch.equal(mixed, rows)
    base = model.generate(input_ids=prompt, flix_features=torch.full_like(ids, -1), **arguments)
    assert not torch.equal(base[: len(mixed)], mixed[: len(base)]), "the updates must matter"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padding_does_not_matter(name):
    model = _model(name)
    ids, _ = routing([ROWS[0]] * 2)
    prompt = batch(name, rows=2)["input_ids"]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), prompt], dim=1)
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), flix_features=ids, max_new_tokens=5, do_sample=False)  # fmt: skip
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    left = model.generate(
        padded, attention_mask=mask, flix_features=ids, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(left[:, 3:], plain)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_sampling_with_several_sequences_a_row(name):
    model = _model(name)
    ids, _ = routing()
    torch.manual_seed(0)
    found = model.generate(
        batch(name)["input_ids"],
        flix_features=ids,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
    )
    assert found.shape[0] == 3 * len(ROWS)


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
    assert torch.equal(after, fresh) and not torch.equal(after, before)


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
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)
