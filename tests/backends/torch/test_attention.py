"""nn.MultiheadAttention: its projections act by row, and all its arguments mean what they do."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix import RoutingError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    disable,
    merge,
    routed,
)
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.attention import (  # noqa: E402
    HEADS,
    IN,
    OUT,
    ROW,
    D,
    L,
    N,
    S,
    drawn,
    inputs,
    made,
    row_of,
    run,
    turned,
)
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import live_pairs, project_back, randomize, routing  # noqa: E402


def future(length, keys):
    return torch.ones(length, keys, dtype=torch.bool).triu(1)


def padding():
    mask = torch.zeros(N, S, dtype=torch.bool)
    for row in range(N):
        mask[row, S - row :] = True
    return mask


WAYS = {
    "plain": ("self", {}, {}),
    "without weights": ("self", {}, {"need_weights": False}),
    "weights of each head": ("cross", {}, {"average_attn_weights": False}),
    "no biases": ("self", {"bias": False}, {}),
    "three inputs": ("all", {}, {}),
    "three without weights": ("all", {}, {"need_weights": False}),
    "sequence first": ("cross", {"batch_first": False}, {}),
    "added keys": ("cross", {"add_bias_kv": True}, {}),
    "added zeros": ("self", {"add_zero_attn": True}, {"need_weights": False}),
    "both added, masked": (
        "self",
        {"add_bias_kv": True, "add_zero_attn": True},
        {"attn_mask": future(S, S), "key_padding_mask": padding()},
    ),
    "mask": ("self", {}, {"attn_mask": future(S, S)}),
    "mask of numbers": ("cross", {}, {"attn_mask": drawn(L, S), "need_weights": False}),
    "mask by head": ("cross", {}, {"attn_mask": drawn(N * HEADS, L, S)}),
    "padding": ("cross", {}, {"key_padding_mask": padding()}),
    "padding of numbers": ("self", {}, {"key_padding_mask": drawn(N, S), "need_weights": False}),
    "both masks": (
        "self",
        {"batch_first": False},
        {"attn_mask": future(S, S), "key_padding_mask": padding(), "need_weights": False},
    ),
    "causal": (
        "self",
        {},
        {"attn_mask": future(S, S), "is_causal": True, "need_weights": False},
    ),
    "causal, weights": ("self", {}, {"attn_mask": future(S, S), "is_causal": True}),
    "causal, padding": (
        "self",
        {},
        {
            "attn_mask": future(S, S),
            "is_causal": True,
            "key_padding_mask": padding(),
            "need_weights": False,
        },
    ),
}


def one_row(how, row):
    found = dict(how)
    if "key_padding_mask" in how:
        found["key_padding_mask"] = how["key_padding_mask"][row : row + 1]
    if how.get("attn_mask") is not None and how["attn_mask"].dim() == 3:
        found["attn_mask"] = how["attn_mask"][row * HEADS : (row + 1) * HEADS]
    return found


@pytest.mark.parametrize("name", WAYS)
def test_each_row_is_its_own_merged_attention(name):
    kind, settings, how = WAYS[name]
    base, model = made(**settings)
    assert [path for path, _ in flix_layers(model)] == [IN, OUT]
    first = settings.get("batch_first", True)
    given = inputs(kind)
    for _ in range(2):  # the second is not watched
        y, weights = run(model, given, how, first)
        y = turned(y, first)
        for row in range(N):
            plain = row_of(model, base, row)
            alone = {id(x): turned(x[row : row + 1], first) for x in given}
            expected, theirs = plain(*(alone[id(x)] for x in given), **one_row(how, row))
            assert_close(y[row : row + 1], turned(expected, first))
            assert (weights is None) == (theirs is None)
            if weights is not None:
                assert_close(weights[row : row + 1], theirs)
    assert_far(turned(base(*(turned(x, first) for x in given), **how)[0], first)[:3], y[:3])


@pytest.mark.parametrize("strategy", ["auto", "gather", "masked"])
@pytest.mark.parametrize("kind", ["self", "cross", "all"])
def test_gradients_are_those_of_the_rows_own_kernels(kind, strategy):
    base, model = made(strategy)
    given = inputs(kind)
    leaf = {id(x): x.clone().requires_grad_() for x in given}
    ids, weights = routing()
    own_weights = weights.double().requires_grad_()
    y, _ = model(*(leaf[id(x)] for x in given), flix_features=ids, flix_weights=own_weights)
    project_back(y)
    pairs = {n: p.detach().clone().requires_grad_() for n, p in live_pairs(model).items()}
    theirs = weights.double().requires_grad_()
    plain = {id(x): x.clone().requires_grad_() for x in given}
    settings, rows = model.flix_config, []
    for row in range(N):
        replaced = dict(base.named_parameters())
        for path, name in ((IN, IN), (OUT, f"{OUT}.weight")):
            for entry, number in enumerate(ids[row].tolist()):
                feature = settings.registry.features[number]
                a = pairs.get(f"{path}.A.{feature[0]}.{feature[1]}")
                if number >= 0 and a is not None:
                    b = pairs[f"{path}.B.{feature[0]}.{feature[1]}"]
                    factor = theirs[row, entry] * settings.scale(path, feature)
                    replaced[name] = replaced[name] + factor * (b @ a)
        alone = {i: x[row : row + 1] for i, x in plain.items()}
        call = tuple(alone[id(x)] for x in given)
        rows.append(torch.func.functional_call(base, replaced, call)[0])
    expected = torch.cat(rows)
    assert_close(y, expected)
    project_back(expected)
    for i, x in plain.items():
        assert_close(leaf[i].grad, x.grad)
    assert_close(own_weights.grad[ids >= 0], theirs.grad[ids >= 0])
    for pair, parameter in live_pairs(model).items():
        wanted = pairs[pair].grad
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), pair
        else:
            assert_close(parameter.grad, wanted, name=pair)


@pytest.mark.parametrize("target", ["in_proj_weight", "out_proj"])
def test_either_projection_alone(target):
    base, model = made(targets=[target])
    given = inputs("cross")
    y, _ = run(model, given, {})
    for row in range(3):
        expected, _ = merge(model, ROWS[row])(*(x[row : row + 1] for x in given))
        assert_close(y[row : row + 1], expected)
    with disable(model):
        assert_close(model(*given)[0], base(*given)[0])


def test_dropout_falls_in_training_alone():
    _, model = made(dropout=0.5)
    given = inputs("self")
    rows = [ROW] * N
    plain = merge(model, ROW).train()
    for how in ({}, {"need_weights": False}):
        torch.manual_seed(3)
        found = run(model.train(), given, how, rows=rows)[0]
        torch.manual_seed(4)
        assert_far(found, run(model, given, how, rows=rows)[0])
        assert_close(run(model.eval(), given, how, rows=rows)[0], plain.eval()(*given)[0])
    assert not vars(model.attn)["flix_kernels"]["in_proj_weight"].training


def test_without_a_batch_one_composition_acts():
    _, model = made()
    x = drawn(S, D)
    how = {"key_padding_mask": padding()[3]}
    with routed(model, ROW):
        found = model(x, x, x, **how)
    expected = merge(model, ROW)(x, x, x, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    ids, weights = routing()
    with pytest.raises(
        RoutingError, match=r"attn\.in_proj_weight' got the input \[6, 8\], which is not a batch"
    ):
        model(x, x, x, flix_features=ids, flix_weights=weights)


@pytest.mark.parametrize(
    "how,message",
    [
        ({"attn_mask": torch.zeros(1, S)}, r"attn_mask is \[1, 6\]; it must be \[6, 6\]"),
        ({"key_padding_mask": torch.zeros(1, S)}, r"key_padding_mask is \[1, 6\].*\[4, 6\]"),
        ({"is_causal": True}, "is_causal is a hint about attn_mask"),
        ({"attn_mask": torch.zeros(S, S, dtype=torch.int64)}, "masks are of bool"),
    ],
)
def test_what_the_plain_module_refuses_is_refused(how, message):
    base, model = made()
    given = inputs("self")
    with pytest.raises((RuntimeError, AssertionError)):
        base(*given, **how)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        run(model, given, how)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_of_torchs_own(training, batch_first):
    """With the sequence first, the attention turns its inputs itself; the other layers are refused, as before."""
    torch.manual_seed(0)
    base = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, HEADS, 16, dropout=0.0, batch_first=batch_first), 2
    ).double()
    changes = {} if batch_first else {"exclude_modules": ["linear1", "linear2"]}
    model = adapt(copy.deepcopy(base), config(**changes)).train(training)
    assert {path.rsplit(".", 1)[1] for path, _ in flix_layers(model)} == {
        "in_proj_weight",
        "out_proj",
        *(["linear1", "linear2"] if batch_first else []),
    }
    randomize(model, std=0.3)
    x = drawn(N, S, D)
    ids, weights = routing()
    with torch.set_grad_enabled(training):
        found = model(turned(x, batch_first), flix_features=ids, flix_weights=weights)
    for row in range(N):
        plain = merge(model, ROWS[row]) if ROWS[row] else base
        expected = plain(turned(x[row : row + 1], batch_first))
        assert_close(turned(found, batch_first)[row : row + 1], turned(expected, batch_first))


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_as_many_positions_as_rows_with_the_sequence_first(kind):
    """The attention knows which of its input's dimensions the rows are; sizes do not tell."""
    base, model = made(batch_first=False)
    x = drawn(N, N, D)
    given = (x, x, x) if kind == "self" else (x, *(y := drawn(N, N, D, seed=2),), y)
    for _ in range(2):
        found = run(model, given, {}, batch_first=False)[0].transpose(0, 1)
        for row in range(N):
            alone = {id(x): x[row : row + 1].transpose(0, 1) for x in given}
            expected = row_of(model, base, row)(*(alone[id(x)] for x in given))[0]
            assert_close(found[row : row + 1], expected.transpose(0, 1))


def test_a_decoder_attends_to_its_memory():
    torch.manual_seed(0)
    base = nn.Transformer(D, HEADS, 1, 1, 16, dropout=0.0, batch_first=True).double().eval()
    model = adapt(copy.deepcopy(base), config()).eval()
    randomize(model, std=0.3)
    source, target = drawn(N, S, D), drawn(N, L, D, seed=2)
    ids, weights = routing()
    causal = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)}
    found = model(source, target, **causal, flix_features=ids, flix_weights=weights)
    for row in range(3):
        one = slice(row, row + 1)
        assert_close(found[one], merge(model, ROWS[row])(source[one], target[one], **causal))


def test_compiled_code_gives_the_same():
    _, model = made()
    given = inputs("self")
    expected = run(model, given, {"need_weights": False})[0]
    project_back(expected)
    wanted = {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = run(compiled, given, {"need_weights": False})[0]
    assert_close(found, expected)
    project_back(found)
    for pair, gradient in wanted.items():
        assert_close(live_pairs(model)[pair].grad, gradient, name=pair)


def test_autocast_computes_in_its_dtype():
    _, model = made()
    given = inputs("self")
    expected = run(model, given, {})[0]
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        same = given[0].float()
        found = run(model, (same, same, same), {})[0]
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, dtype="bfloat16")
