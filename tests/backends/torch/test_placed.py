"""Bases that accelerate placed or offloaded, and bases without values: before and after adapt and load."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_module  # noqa: E402
from torch import nn  # noqa: E402

from flix import TargetError  # noqa: E402
from flix.backends.torch import adapt, load, merge, merge_in_place, save, trainable_parameters  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import ROW, llama, parameters_of, randomize  # noqa: E402
from tests.helpers.zoo import inputs_of  # noqa: E402

ROWS = [{"language": "hau", "task": "ner"}, {"language": "swa", "task": "pos"}]
CPU = torch.device("cpu")


def base():
    torch.manual_seed(0)
    return llama().eval()


def tokens():
    return inputs_of("llama")["input_ids"][:1].expand(2, -1)


def logits(model):
    return model(tokens(), flix_features=registry().encode(ROWS).ids).logits


def dispatched(model, _):
    places = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    return accelerate.dispatch_model(model, places, force_hooks=True, main_device="cpu")


def on_disk(model, tmp_path):
    return accelerate.disk_offload(model, str(tmp_path / "offloaded"), execution_device=CPU)


def on_the_host(model, _):
    return accelerate.cpu_offload(model, execution_device=CPU)


WAYS = {way.__name__: way for way in (dispatched, on_the_host, on_disk)}
BASES = {"backend": "bases", "argument": "name"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = adapt(base(), config())
    randomize(model)
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def wanted(saved):
    with torch.no_grad():
        return logits(load(base(), saved))


@over(WAYS, "before", **BASES)
def test_bases_that_are_placed_first(name, saved, wanted, tmp_path):
    way = WAYS[name]
    model = load(way(base(), tmp_path), saved)
    with torch.no_grad():
        for _ in range(2):
            assert_close(logits(model), wanted)
    assert all(not p.is_meta for p in trainable_parameters(model))


@over(WAYS, "mixed batch", "save and load", **BASES)
def test_adapted_models_that_are_placed_later(name, saved, wanted, tmp_path):
    way = WAYS[name]
    model = load(base(), saved)
    held = parameters_of(model)
    model = way(model, tmp_path)
    with torch.no_grad():
        for _ in range(2):
            assert_close(logits(model), wanted)
    if way is not dispatched:
        assert all(p is held[f] for f, p in parameters_of(model).items())
    save(model, tmp_path / "again")
    with torch.no_grad():
        assert_close(logits(load(base(), tmp_path / "again")), wanted)


@over(WAYS, "gradients", **BASES)
@pytest.mark.parametrize("first", [True, False])
def test_features_of_placed_bases_train_as_others_do(name, first, tmp_path):
    way, found = WAYS[name], []
    for place in (lambda model, _: model, way):
        model = place(base(), tmp_path) if first else base()
        model = adapt(model, config())
        randomize(model)
        model = model if first else place(model, tmp_path)
        optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-2)
        for _ in range(2):
            logits(model.train()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({f: p.detach().clone() for f, p in parameters_of(model).items()})
    for feature, value in found[0].items():
        assert_close(found[1][feature], value, times=10)


# Older releases of transformers take a model for where its first parameter is.
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on:UserWarning"
)
def test_generation(saved, tmp_path):
    ids = registry().encode(ROWS).ids
    plain, placed = load(base(), saved), load(on_the_host(base(), tmp_path), saved)
    answers = [
        m.generate(tokens(), flix_features=ids, max_new_tokens=4, do_sample=False)
        for m in (plain, placed)
    ]
    assert torch.equal(*answers)


@over(["dispatched"], "merge", **BASES)
def test_dispatched_models_are_merged_and_get_their_own_forward_back(name, saved, tmp_path):
    model = load(WAYS[name](base(), tmp_path), saved)
    found = merge(model, ROW)
    assert not list(flix_layers(found))
    plain = merge(load(base(), saved), ROW)
    with torch.no_grad():
        assert_close(found(tokens()).logits, plain(tokens()).logits)
        again = remove_hook_from_module(found, recurse=True)
        assert_close(again(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("verb", [merge, merge_in_place])
@pytest.mark.parametrize("way", [on_the_host, on_disk])
def test_kernels_that_are_elsewhere_are_not_merged(way, verb, saved, wanted, tmp_path):
    model = way(load(base(), saved), tmp_path)
    with pytest.raises(
        TargetError, match=r"kernel of layer 'model\.layers\.0.*offloaded.*remove_hook_from_module"
    ):
        verb(model, ROW)
    with torch.no_grad():
        assert_close(logits(model), wanted)
    back = remove_hook_from_module(model, recurse=True)
    with torch.no_grad():
        assert_close(logits(back), wanted)
        y = merge(back, ROW)(tokens()).logits
        assert_close(y, merge(load(base(), saved), ROW)(tokens()).logits)


@over(["meta"], "mixed batch", "before", **BASES)
def test_a_base_without_values_gets_features_with_theirs(name, saved, wanted):
    with torch.device("meta"):
        empty = base()
    model = load(empty, saved)
    values = {f: p.detach().clone() for f, p in parameters_of(model).items()}
    assert not any(v.is_meta for v in values.values())
    model.to_empty(device="cpu")
    for feature, parameter in parameters_of(model).items():
        assert torch.equal(parameter, values[feature])
    plain = base()
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    for name, buffer in plain.named_buffers():
        model.get_buffer(name).copy_(buffer)
    with torch.no_grad():
        assert_close(logits(model), wanted)


def test_a_base_whose_values_come_after_adapt(wanted, saved):
    with torch.device("meta"):
        empty = base()
    model, plain = load(empty, saved), base()
    model.load_state_dict(plain.state_dict(), strict=False, assign=True)
    model.model.rotary_emb = copy.deepcopy(plain.model.rotary_emb)  # no part of the state
    with torch.no_grad():
        assert_close(logits(model), wanted)


@over(["meta"], "save and load", **BASES)
def test_a_model_without_values_is_still_adapted_and_saved(name, tmp_path):
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    model = adapt(empty, config())
    randomize(model)
    save(model, tmp_path)
    again = load(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    for feature, parameter in parameters_of(model).items():
        assert torch.equal(parameter, parameters_of(again)[feature])


def test_bases_whose_hooks_were_removed(saved, wanted, tmp_path):
    model = load(remove_hook_from_module(on_the_host(base(), tmp_path), recurse=True), saved)
    with torch.no_grad():
        assert_close(logits(model), wanted)


def test_a_forward_that_something_else_patched_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    own = model[0].forward
    model[0].forward = lambda x: own(x) * 2
    with pytest.raises(TargetError, match="its forward is patched on the instance"):
        adapt(model, config(target_modules=["0"]))
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(TargetError, match="its forward is patched on the instance"):
        adapt(model, config(target_modules=["0"]))
