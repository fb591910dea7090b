"""Paged banks: an adapter set ten times the device's budget trains and serves with the numbers unchanged."""

import collections
import copy
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flix  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    add_feature,
    merge,
    page,
    save,
    trainable_parameters,
    unpage,
)
from tests.helpers.tolerance import assert_close, assert_same_bits  # noqa: E402
from tests.helpers.torch import live_pairs, llama, randomize, t5  # noqa: E402

LANGUAGES = [f"l{i}" for i in range(60)]
REGISTRY = flix.FeatureRegistry({"language": LANGUAGES, "task": ["ner", "pos"]})
CONFIG = flix.FlixConfig(registry=REGISTRY, ranks=flix.ranks.by_group(language=2, task=3))


def adapted(base=llama, **changes):
    torch.manual_seed(0)
    model = adapt(base(), CONFIG, **changes)
    randomize(model)
    return model


def total(model):
    return sum(p.nbytes for p in live_pairs(model).values())


def batches(count, rows=3, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        named = [
            {"language": str(rng.choice(LANGUAGES)), "task": str(rng.choice(["ner", "pos"]))}
            for _ in range(rows)
        ]
        tokens = torch.from_numpy(rng.integers(3, 30, (rows, 7)))
        yield tokens, torch.from_numpy(REGISTRY.encode(named, width=2).ids)


def train(model, pager=None, steps=8, fused=False):
    optimizer = torch.optim.AdamW(trainable_parameters(model), 0.01, weight_decay=0.1, fused=fused)
    model.train()
    made = list(batches(steps))
    losses = []
    for tokens, ids in made:
        if pager is not None:
            pager.prefetch(ids)
        loss = model(input_ids=tokens, labels=tokens, flix_features=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("base", [llama, t5])
@pytest.mark.parametrize(("checkpointing", "fused"), [(False, False), (False, True), (True, False)])
def test_training_ten_times_the_budget_is_bit_identical(base, checkpointing, fused):
    plain, paged = adapted(base), adapted(base)
    pager = page(paged, total(paged) // 10)
    if checkpointing:
        for model in (plain, paged):
            model.gradient_checkpointing_enable()
    before = {name: p.detach().clone() for name, p in live_pairs(paged).items()}
    losses = train(paged, pager, fused=fused), train(plain, fused=fused)
    assert_same_bits(*losses)
    after, wanted = live_pairs(paged), live_pairs(plain)
    moved = 0
    for name, value in wanted.items():
        assert torch.equal(after[name], value), name
        moved += not torch.equal(value, before[name])
    assert 0 < moved < len(wanted)  # absent features stayed where they were
    assert 0 < pager.peak <= pager.budget
    assert pager.copied > 2 * pager.budget  # pages went and came back


def test_serving_and_generation_are_bit_identical():
    plain, paged = adapted().eval(), adapted().eval()
    pager = page(paged, total(paged) // 10)
    for tokens, ids in batches(5, seed=3):
        with torch.no_grad():
            wanted = plain(input_ids=tokens, flix_features=ids).logits
            assert torch.equal(paged(input_ids=tokens, flix_features=ids).logits, wanted)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        wanted = plain.generate(tokens, flix_features=ids, **options)
        copied = pager.copied
        assert torch.equal(paged.generate(tokens, flix_features=ids, **options), wanted)
        assert pager.copied == copied  # the forward above had brought the pages
    assert pager.peak <= pager.budget


def test_prefetched_pages_are_not_copied_again_and_stale_ones_are():
    model = adapted().eval()
    pager = page(model, total(model) // 2)
    (tokens, ids), *_ = batches(1)
    pager.prefetch(ids)
    copied = pager.copied
    assert copied > 0
    with torch.no_grad():
        first = model(input_ids=tokens, flix_features=ids).logits
        assert pager.copied == copied
        for parameter in live_pairs(model).values():
            parameter.mul_(2.0)
        second = model(input_ids=tokens, flix_features=ids).logits
    assert pager.copied == 2 * copied and not torch.equal(first, second)


def test_a_page_fetched_before_a_fused_step_is_fetched_again():
    """Fused optimizers change parameters without counting it; the features in both batches must not be stale."""
    plain, paged = adapted(), adapted()
    pager = page(paged, total(paged))
    (tokens, ids), (_, other) = batches(2)
    other[0] = ids[0]
    losses = []
    for model in (plain, paged):
        optimizer = torch.optim.AdamW(trainable_parameters(model), 0.1, fused=True)
        model.train()(input_ids=tokens, labels=tokens, flix_features=ids).loss.backward()
        if model is paged:
            pager.prefetch(other)
        optimizer.step()
        losses.append(model(input_ids=tokens, labels=tokens, flix_features=other).loss.detach())
    assert torch.equal(*losses)


def test_least_recently_used_goes_first():
    model = adapted().eval()
    size = total(model)
    one = [REGISTRY.encode([{"language": name}], width=1).ids for name in LANGUAGES[:4]]
    pager = page(model, size)
    pager.prefetch(one[0])
    pager.budget = 2 * pager.resident
    for ids in (one[1], one[0], one[2]):
        pager.prefetch(ids)
    copied = pager.copied
    pager.prefetch(one[0])
    assert pager.copied == copied  # used since
    pager.prefetch(one[1])
    assert pager.copied > copied  # the oldest had made room


def test_a_batch_that_does_not_fit_is_an_error_with_the_figures():
    model = adapted().eval()
    page(model, 1000)
    tokens, ids = next(batches(1))
    with pytest.raises(
        flix.ConfigError,
        match=r"features \(language=.*bytes on cpu, but the budget of page\(\) is 1,000",
    ):
        model(input_ids=tokens, flix_features=ids)
    with pytest.raises(flix.ConfigError, match="at least one byte, got 0"):
        page(model, 0)


def test_the_rest_of_a_models_life(tmp_path):
    model = adapted()
    plain = copy.deepcopy(model)
    pager = page(model, total(model) // 5)
    train(model, pager, steps=2)
    train(plain, steps=2)
    row = {"language": "l3", "task": "ner"}
    for a, b in zip(merge(model, row).parameters(), merge(plain, row).parameters(), strict=True):
        assert torch.equal(a, b)
    save(model, tmp_path / "paged")
    save(plain, tmp_path / "plain")
    read = [(tmp_path / name / "flix.safetensors").read_bytes() for name in ("paged", "plain")]
    assert read[0] == read[1]
    tokens, ids = next(batches(1))
    copied = copy.deepcopy(model).eval()  # not paged, and right
    with torch.no_grad():
        wanted = plain.eval()(input_ids=tokens, flix_features=ids).logits
        assert_close(copied(input_ids=tokens, flix_features=ids).logits, wanted)
    add_feature(model, "language", "new", rank=2)
    new = torch.tensor([[REGISTRY.with_feature("language", "new").id("language", "new")]])
    model.eval()(input_ids=tokens[:1], flix_features=new)
    unpage(model)
    with torch.no_grad():
        assert_close(model.eval()(input_ids=tokens, flix_features=ids).logits, wanted)


def test_compiling_a_paged_model_is_refused():
    model = adapted().eval()
    page(model, total(model))
    tokens, ids = next(batches(1))
    with pytest.raises(Exception, match="a paged model cannot be compiled"):
        torch.compile(model, fullgraph=True, backend="eager")(input_ids=tokens, flix_features=ids)
    plain = copy.deepcopy(model)  # copies are not paged
    with torch.no_grad():
        wanted = model(input_ids=tokens, flix_features=ids).logits
        compiled = torch.compile(plain, fullgraph=True, backend="eager")
        assert_close(compiled(input_ids=tokens, flix_features=ids).logits, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_the_features_stay_on_the_host():
    plain, paged = adapted().cuda(), adapted().cuda()
    pager = page(paged, total(paged) // 10)
    assert all(p.device.type == "cpu" and p.is_pinned() for p in live_pairs(paged).values())
    made = [(t.cuda(), i.cuda()) for t, i in batches(4)]
    for tokens, ids in made:
        pager.prefetch(ids)
        losses = []
        for model in (plain, paged):
            loss = model.train()(input_ids=tokens, labels=tokens, flix_features=ids).loss
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
    for name, parameter in live_pairs(paged).items():
        other = live_pairs(plain)[name]
        assert (parameter.grad is None) == (other.grad is None)
        if other.grad is not None:
            assert torch.equal(parameter.grad, other.grad.cpu())


def test_eight_threads_get_the_right_pages_within_the_budget():
    """Half of the features fit; threads load, use and drop pages at once."""
    model = adapted().eval()
    registry, size = model.flix_config.registry, 7
    tokens = torch.arange(14).view(2, size) % 20
    rows = [{"language": LANGUAGES[i], "task": ("ner", "pos")[i % 2]} for i in range(12)]
    ids = torch.from_numpy(registry.encode(rows).ids)
    batches = [ids[[i, (5 * i + 3) % 12]] for i in range(12)]
    with torch.no_grad():
        wanted = [model(input_ids=tokens, flix_features=b).logits for b in batches]
    pager = page(model, 8 * max(p.nbytes for p in model.flix_bank.parameters()))
    found, failed = collections.Counter(), []

    def serve(thread):
        with torch.no_grad():
            for i in range(60):
                k = (thread * 7 + i) % 12
                try:
                    pager.prefetch(batches[(k + 1) % 12])
                    y = model(input_ids=tokens, flix_features=batches[k].clone()).logits
                    found[torch.equal(y, wanted[k])] += 1
                except Exception as error:
                    failed.append(error)

    threads = [threading.Thread(target=serve, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and found == {True: 480}
    assert 0 < pager.resident <= pager.peak <= pager.budget
