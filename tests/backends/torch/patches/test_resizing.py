"""resize_token_embeddings of an adapted model: old words keep their bits, new ones start as the base has them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix.backends.torch import adapt, load, merge, merge_in_place, save  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import live_pairs, make, output, randomize  # noqa: E402

ROW = {"language": "swa", "task": "pos"}


def _adapted(name, targets, tie=False):
    base = make(name, torch.float32)
    if tie:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    model = adapt(base, config(target_modules=targets))
    randomize(model)
    return model.eval()


def _run(model, tokens):
    encoded = model.flix_config.registry.encode([ROW] * len(tokens))
    with torch.no_grad():
        return output(model(input_ids=tokens, flix_features=encoded))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["q_proj", "embed_tokens", "lm_head"]]
)
def test_growing_and_shrinking(targets, tie, tmp_path):
    model = _adapted("llama", targets, tie)
    size = model.config.vocab_size
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    before, kept = (
        _run(model, tokens),
        {n: v.detach().clone() for n, v in live_pairs(model).items()},
    )
    parameters = dict(model.flix_bank.named_parameters())
    model.resize_token_embeddings(size + 7)
    assert all(model.flix_bank.get_parameter(n) is p for n, p in parameters.items())
    assert_close(_run(model, tokens)[..., :size], before)
    for name, value in live_pairs(model).items():
        old = kept[name]
        part = value[: old.shape[0], : old.shape[1]]
        assert torch.equal(part, old) and value.count_nonzero() == part.count_nonzero()
    new = torch.tensor([[1, size + 3, 2]])
    assert_close(_run(model, new), output(merge(model, ROW)(input_ids=new)))
    # It trains, and its files are those of the larger model.
    ids = model.flix_config.registry.encode([ROW])
    output(model.train()(input_ids=new, flix_features=ids)).sum().backward()
    grads = {n: v.grad for n, v in live_pairs(model).items() if v.grad is not None}
    assert grads and all(g.shape == live_pairs(model)[n].shape for n, g in grads.items())
    save(model.eval(), tmp_path)
    base = make("llama", torch.float32)
    base.resize_token_embeddings(size + 7)
    base.load_state_dict(
        {n: v for n, v in model.state_dict().items() if not n.startswith("flix_bank")}, strict=False
    )
    assert_close(_run(load(base, tmp_path).eval(), new), _run(model, new))
    model.resize_token_embeddings(size - 3)
    assert_close(_run(model, tokens)[..., : size - 3], before[..., : size - 3])


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_other_architectures(name):
    targets = {"gpt2": ["wte"], "t5": ["shared"], "bert": ["word_embeddings"]}[name]
    model = _adapted(name, targets)
    tokens = torch.tensor([[1, 2, 3]])
    given = {"decoder_input_ids": tokens} if name == "t5" else {}
    ids = model.flix_config.registry.encode([ROW])
    with torch.no_grad():
        before = output(model(input_ids=tokens, **given, flix_features=ids))
        size = model.config.vocab_size
        model.resize_token_embeddings(size + 5)
        after = output(model(input_ids=tokens, **given, flix_features=ids))
        assert_close(after[..., : before.shape[-1]], before)
        new = torch.tensor([[1, size + 1]])
        given = {"decoder_input_ids": new} if name == "t5" else {}
        found = output(model(input_ids=new, **given, flix_features=ids))
        assert_close(found, output(merge(model, ROW)(input_ids=new, **given)))


def test_what_cannot_be_followed_is_refused():
    model = _adapted("llama", ["embed_tokens"])
    merge_in_place(model, ROW)
    with pytest.raises(flix.FlixError, match="merged"):
        model.resize_token_embeddings(80)
    model = _adapted("llama", ["embed_tokens"])
    double = 2 * model.config.vocab_size
    model.model.embed_tokens.weight = torch.nn.Parameter(
        torch.zeros(double, model.config.hidden_size)
    )
    with pytest.raises(flix.TargetError, match=r"embed_tokens.* now has the sizes"):
        _run(model, torch.tensor([[1, 2]]))
