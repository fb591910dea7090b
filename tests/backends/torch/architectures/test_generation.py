"""Mixed-batch generation equals row-by-row generation, token for token."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix import RoutingError  # noqa: E402
from flix.backends.torch import adapt, merge, routed  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import ROWS, config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import randomize, routing  # noqa: E402
from tests.helpers.zoo import DECODERS, ENCODER_DECODERS, RELATIVES, ZOO, inputs_of, pretrained  # noqa: E402

GENERATORS = [*DECODERS, *ENCODER_DECODERS]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def _model(name, dtype=torch.float64):
    model = adapt(pretrained(name, dtype=dtype), config())
    randomize(model, std=0.3)
    return model.eval()


def _prompts(name):
    prompt = inputs_of(name, len(ROWS))["input_ids"]
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


def _some(prompts, part):
    return {key: value[part] for key, value in prompts.items()}


def _mixed_equals_rows(name, **arguments):
    """The sequences of a mixed batch, after they are found equal to those of each row alone."""
    model = _model(name)
    prompts = _prompts(name)
    ids, weights = routing()

    def run(part):
        return model.generate(
            **_some(prompts, part),
            flix_features=ids[part],
            flix_weights=weights[part],
            **{**GREEDY, **arguments},
        )

    mixed = run(slice(None))
    rows = torch.cat([run(slice(i, i + 1)) for i in range(len(ROWS))])
    assert torch.equal(mixed, rows)
    base = model.generate(
        **prompts, flix_features=torch.full_like(ids, -1), **{**GREEDY, **arguments}
    )
    assert not torch.equal(base, mixed), "the updates must matter"
    each = len(mixed) // len(ROWS)
    assert torch.equal(base[-each:], mixed[-each:]), "the last row is the base's"
    # An encoder left without routing would be so in both; a merged model has its updates in the kernels.
    part = slice(1, 2)
    plain = merge(model, ROWS[1]).generate(**_some(prompts, part), **{**GREEDY, **arguments})
    assert torch.equal(mixed[each : 2 * each], plain)
    return mixed


@over(GENERATORS, "greedy")
@pytest.mark.parametrize("cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_greedy(name, cache):
    _mixed_equals_rows(name, use_cache=cache)


@over(GENERATORS, "beams")
def test_beams(name):
    one = _mixed_equals_rows(name, num_beams=4)
    several = _mixed_equals_rows(name, num_beams=4, num_return_sequences=2)
    assert len(several) == 2 * len(ROWS)
    assert torch.equal(several[::2], one)


@over(GENERATORS, "static cache", slow=RELATIVES)
def test_static_cache(name):
    static = _mixed_equals_rows(name, cache_implementation="static")
    assert torch.equal(static, _mixed_equals_rows(name))


@over(GENERATORS, "sampling")
def test_samples_of_a_row_come_from_its_own_distribution(name):
    """Sampled tokens cannot be compared one by one; the distributions that they were drawn from can."""
    model = _model(name)
    prompts = _prompts(name)
    ids, weights = routing()
    arguments = {**prompts, "flix_features": ids, "flix_weights": weights, "max_new_tokens": 4}
    torch.manual_seed(0)
    found = model.generate(
        **arguments,
        do_sample=True,
        temperature=0.9,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(found.sequences) == 3 * len(ROWS)
    logits = torch.stack(found.logits, dim=1)  # [rows * 3, new, vocabulary]
    for row in range(len(ROWS)):
        alone = {key: value[row : row + 1] for key, value in prompts.items()}
        for sample in range(3 * row, 3 * row + 3):
            sequence = found.sequences[sample : sample + 1]
            if ZOO[name].kind == "encoder-decoder":
                inputs, prefix = {**alone, "decoder_input_ids": sequence[:, :-1]}, 0
            else:
                inputs, prefix = {"input_ids": sequence[:, :-1]}, alone["input_ids"].shape[1] - 1
            part = slice(row, row + 1)
            with torch.no_grad():
                expected = model(**inputs, flix_features=ids[part], flix_weights=weights[part])
            assert_close(logits[sample], expected.logits[0, prefix:], times=10)
    # Of one choice only, samples are the greedy tokens: each row's own, three times.
    certain = model.generate(**arguments, do_sample=True, top_k=1, num_return_sequences=3)
    greedy = model.generate(**arguments, do_sample=False)
    assert torch.equal(certain, greedy.repeat_interleave(3, dim=0))


@over(DECODERS, "padding")
def test_left_padding_does_not_matter(name):
    # Padding is masked by the smallest float64, which transformers' eager attention softens in float32.
    model = _model(name, torch.float32)
    prompts = _prompts(name)
    ids, weights = routing()
    given = {"flix_features": ids, "flix_weights": weights, **GREEDY}
    plain = model.generate(**prompts, **given)
    padding = torch.zeros(len(ROWS), 3, dtype=torch.int64)
    padded = {key: torch.cat([padding, value], dim=1) for key, value in prompts.items()}
    assert torch.equal(model.generate(**padded, **given)[:, 3:], plain)


@over(ENCODER_DECODERS, "padding")
def test_padded_prompts_of_an_encoder(name):
    model = _model(name)
    prompts = _prompts(name)
    ids, weights = routing()
    given = {"flix_features": ids, "flix_weights": weights, **GREEDY}
    plain = model.generate(**prompts, **given)
    padding = torch.zeros(len(ROWS), 3, dtype=torch.int64)
    padded = {key: torch.cat([value, padding], dim=1) for key, value in prompts.items()}
    assert torch.equal(model.generate(**padded, **given), plain)


@over(GENERATORS, "prompt lookup", slow=RELATIVES)
def test_assisted_generation_gives_the_greedy_tokens(name):
    """transformers allows it for one row at a time."""
    model = _model(name)
    ids, weights = routing()
    for row in range(2):
        part = slice(row, row + 1)
        given = {
            **_some(_prompts(name), part),
            "flix_features": ids[part],
            "flix_weights": weights[part],
            "eos_token_id": 1,  # older releases of transformers fail without one
        }
        plain = model.generate(**given, **GREEDY)
        assert torch.equal(model.generate(**given, **GREEDY, prompt_lookup_num_tokens=2), plain)


@over(GENERATORS, "routed", slow=RELATIVES)
def test_routed_generation_needs_no_keyword(name):
    model = _model(name)
    prompts = _prompts(name)
    row = ROWS[1]
    ids, weights = routing([row] * len(ROWS))
    ways = ({}, {"num_beams": 3, "num_return_sequences": 2})
    for way in ways:
        given = {**prompts, **GREEDY, **way}
        expected = model.generate(**given, flix_features=ids, flix_weights=weights)
        with routed(model, row):
            assert torch.equal(model.generate(**given), expected)


def test_an_assistant_helps_a_routed_model():
    """By keyword, the assistant would have to take flix_features, too: adapted models do."""
    model = _model("llama")
    prompt = _prompts("llama")["input_ids"][:1]
    ids, weights = routing([ROWS[0]])
    given = {"flix_features": ids, "flix_weights": weights, **GREEDY}
    expected = model.generate(prompt, **given)
    assert torch.equal(model.generate(prompt, **given, assistant_model=model), expected)
    with routed(model, ROWS[0]):
        found = model.generate(prompt, **GREEDY, assistant_model=pretrained("llama"))
    assert torch.equal(found, expected)


def test_an_encoder_run_beforehand():
    model = _model("t5")
    prompts = _prompts("t5")
    ids, weights = routing()
    given = {"flix_features": ids, "flix_weights": weights}
    hidden = model.get_encoder()(**prompts, **given)
    expected = model.generate(**prompts, **given, **GREEDY)
    assert torch.equal(model.generate(encoder_outputs=hidden, **given, **GREEDY), expected)
    with pytest.raises(RoutingError, match="routes 2 rows, but the batch has 4 rows"):
        model.generate(encoder_outputs=hidden, flix_features=ids[:2], **GREEDY)


def test_continuous_batching_is_refused():
    model = _model("llama")
    for call in (model.init_continuous_batching, lambda: model.generate_batch([[3, 4, 5]])):
        with pytest.raises(RoutingError, match="gives the model no routing"):
            call()


@over(["byt5"], "greedy")
def test_text_through_the_byte_tokenizer(name):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    model = _model(name)
    texts = ["Ina kwana?", "Habari ya asubuhi", "Ẹ káàárọ̀", "Sawubona"]
    rows = [{**row, "task": "ner"} for row in ROWS]
    encoded = registry().encode(rows)
    mixed = model.generate(
        **tokenizer(texts, return_tensors="pt", padding=True), flix_features=encoded, **GREEDY
    )
    for i, text in enumerate(texts):
        alone = model.generate(
            **tokenizer([text], return_tensors="pt"), flix_features=encoded[i], **GREEDY
        )
        assert torch.equal(mixed[i : i + 1], alone)
