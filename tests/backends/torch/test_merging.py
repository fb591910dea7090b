"""One composition in the kernels of a model, for good or for a while."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import FeatureError, RoutingError, TargetError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    export_peft,
    load,
    merge,
    merge_in_place,
    save,
    share_base,
    trainable_parameters,
    unmerge,
)
from flix.backends.torch.layer import flix_layers  # noqa: E402
from flix.backends.torch.parameters import Bank  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    ROW,
    adapted,
    batch,
    live_pairs,
    make,
    output,
    randomize,
    run,
)
from tests.helpers.zoo import RELATIVES, ZOO, inputs_of  # noqa: E402

MADE = [name for name in ZOO if name != "minilm"]  # that one has weights of its own


def test_merge_refuses_what_activates_nothing_or_is_unknown():
    model = adapted()
    with pytest.raises(flix.RoutingError, match="activates none"):
        merge(model, {})
    with pytest.raises(FeatureError, match="no feature 'swq'"):
        merge(model, {"language": "swq"})


def values(model):
    return {name: p.detach().clone() for name, p in live_pairs(model).items()}


@over(MADE, "merge in place", slow=RELATIVES)
def test_merged_in_place_and_out_again_bit_for_bit(name):
    model = adapted(name, target_modules=[*ZOO[name].embeddings])
    kernels = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted, rows = run(model, name), [ROW] * 3
    merged = output(merge(model, ROW)(**inputs_of(name, rows=3)))
    merge_in_place(model, ROW)
    with torch.no_grad():
        assert_close(output(model(**inputs_of(name, rows=3))), merged)
    with pytest.raises(RoutingError, match=r"merged in place, with .*'swa'.*unmerge\(model\)"):
        run(model, name, rows)
    with pytest.raises(TargetError, match="merged already"):
        merge_in_place(model, ROW)
    twin = output(merge(model, {"task": "ner"})(**inputs_of(name, rows=3)))
    unmerge(model)
    assert all(torch.equal(p, kernels[n]) for n, p in model.named_parameters())
    assert_close(run(model, name), wanted)
    # A copy merged from a merged model starts from the base's kernels, not from the folded ones.
    assert_close(output(merge(model, {"task": "ner"})(**inputs_of(name, rows=3))), twin)
    with pytest.raises(TargetError, match="not merged"):
        unmerge(model)


def test_a_merged_model_saves_its_features(tmp_path):
    model = adapted()
    before = values(model)
    merge_in_place(model, ROW)
    save(model, tmp_path)
    again = load(make("llama"), tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in live_pairs(again).items())


def test_two_adapters_side_by_side_share_one_base():
    first = adapted(seed=0)
    wanted = run(first)
    second = share_base(first)
    assert not list(flix_layers(second)) and "flix_features" not in str(vars(second))
    adapt(second, config(target_modules=["q_proj", "v_proj"]))
    randomize(second, 7)
    second.eval()
    base = dict(make("llama").named_parameters())
    mine, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    assert all(mine[n] is theirs[n] for n in base)
    assert_close(run(first), wanted)
    alone = adapt(make("llama"), config(target_modules=["q_proj", "v_proj"])).eval()
    randomize(alone, 7)
    assert_close(run(second), run(alone))
    assert_far(run(second), wanted)
    # Each trains by itself.
    second.train()
    encoded = second.flix_config.registry.encode([ROW])
    optimizer = torch.optim.AdamW(trainable_parameters(second), 0.1)
    output(second(**batch("llama", rows=1), flix_features=encoded)).sum().backward()
    optimizer.step()
    assert_close(run(first), wanted)
    assert all(not p.requires_grad for n, p in first.named_parameters() if n in base)


class _Headed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        self.again = self.head  # a second name

    def forward(self, x):
        return self.again(self.q(x))


def _saved_with_head(folder, value):
    model = adapt(_Headed(), config(target_modules=["q"]))
    model.head.requires_grad_(True)
    torch.nn.init.constant_(model.head.weight, value)
    save(model, folder)
    return folder


@pytest.mark.parametrize("plain", [False, True])
def test_adapters_on_one_base_keep_their_own_trained_heads(plain, tmp_path):
    one, two = (_saved_with_head(tmp_path / str(v), v) for v in (1.0, 2.0))
    base = _Headed()
    first = load(share_base(base) if plain else base, one)
    second = load(share_base(base if plain else first), two)
    assert first.q.weight is second.q.weight
    for model, value in ((first, 1.0), (second, 2.0)):
        assert model.head.weight.eq(value).all() and model.again.weight is model.head.weight
        assert model.head.weight.requires_grad and len(trainable_parameters(model)) == 7
        save(model, tmp_path / "again")
        assert load(_Headed(), tmp_path / "again").head.weight.eq(value).all()
    assert not plain or (base.head.weight != 1).all()


def test_a_head_that_would_train_for_two_models_is_refused():
    first = adapt(_Headed(), config(target_modules=["q"]))
    second = adapt(share_base(first), config(target_modules=["q"]))
    second.head.requires_grad_(True)
    with pytest.raises(TargetError, match=r"head\.weight.* would also train for another model"):
        trainable_parameters(second)
    for name in ("weight", "bias"):
        setattr(second.head, name, torch.nn.Parameter(getattr(second.head, name).detach().clone()))
    assert len(trainable_parameters(second)) == 7


def test_merging_reads_the_features_of_the_composition_alone(monkeypatch, tmp_path):
    """Of 500 registered features, merge, merge_in_place and export_peft look at one."""
    many = flix.FeatureRegistry({"language": [f"l{i}" for i in range(500)]})
    model = adapt(make("llama"), flix.FlixConfig(registry=many, ranks=2))
    read, arrays = [], Bank.arrays
    monkeypatch.setattr(Bank, "arrays", lambda self, some: read.extend(some) or arrays(self, some))
    held = {id(p) for p in model.flix_bank.parameters()}
    monkeypatch.setattr(
        torch.nn.Parameter, "__deepcopy__", _refuse_copies_of(held, torch.nn.Parameter.__deepcopy__)
    )
    merge(model, {"language": "l7"})
    unmerge(merge_in_place(model, {"language": "l7"}))
    export_peft(model, {"language": "l7"}, tmp_path)
    assert set(read) == {("language", "l7")} and len(read) == 3


def _refuse_copies_of(held, copy_of):
    def deepcopy(parameter, memo):
        assert id(parameter) not in held, "a feature was copied"
        return copy_of(parameter, memo)

    return deepcopy
