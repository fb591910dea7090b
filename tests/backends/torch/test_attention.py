"""nn.MultiheadAttention: its projections act by row, and all its arguments mean what they do."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix import AdapterError, RoutingError, TargetError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    add_feature,
    disable,
    export_peft,
    import_peft,
    load,
    merge,
    merge_in_place,
    routed,
    save,
    unmerge,
)
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import live_pairs, project_back, randomize, routing  # noqa: E402

ROW = {"language": "swa", "task": "pos"}
N, L, S, D, HEADS = 4, 5, 6, 8, 2
IN, OUT = "attn.in_proj_weight", "attn.out_proj"


class Net(nn.Module):
    """An attention as a model has it."""

    def __init__(self, **settings):
        super().__init__()
        self.attn = nn.MultiheadAttention(D, HEADS, **settings)

    def forward(self, query, key, value, **how):
        return self.attn(query, key, value, **how)


def made(strategy="auto", targets="all-linear", **settings):
    torch.manual_seed(0)
    base = Net(**{"batch_first": True, **settings}).double().eval()
    for bias in (base.attn.in_proj_bias, base.attn.out_proj.bias):
        if bias is not None:  # torch begins with zeros
            nn.init.normal_(bias)
    model = adapt(copy.deepcopy(base), config(target_modules=targets), strategy=strategy)
    randomize(model, std=0.3)
    return base, model.eval()


def drawn(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(kind):
    """Queries, keys and values ``[N, ..., D]``: of one tensor, of two, of three."""
    if kind == "self":
        x = drawn(N, S, D)
        return x, x, x
    query, key = drawn(N, L, D), drawn(N, S, D, seed=2)
    return (query, key, key) if kind == "cross" else (query, key, drawn(N, S, D, seed=3))


def row_of(model, base, row):
    """The plain module under one row's features."""
    return merge(model, ROWS[row]) if ROWS[row] else base


def turned(x, batch_first):
    return x if batch_first else x.transpose(0, 1)


def run(model, given, how, batch_first=True, rows=ROWS):
    ids, weights = routing(rows)
    same = {id(x): turned(x, batch_first) for x in given}
    return model(*(same[id(x)] for x in given), **how, flix_features=ids, flix_weights=weights)


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


def test_files_copies_merging_and_growth(tmp_path):
    base, model = made()
    given = inputs("cross")
    expected = run(model, given, {})[0]
    save(model, tmp_path)
    fresh = load(copy.deepcopy(base), tmp_path).eval()
    assert_close(run(fresh, given, {})[0], expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(run(twin, given, {})[0], expected)
        with torch.no_grad():
            twin.attn.in_proj_weight.zero_()
        assert_far(run(twin, given, {})[0], expected)
    assert_close(run(model, given, {})[0], expected)
    rows = run(model, given, {}, rows=[ROW] * N)[0]
    merged = merge(model, ROW)
    assert type(merged.attn) is nn.MultiheadAttention
    assert merged.state_dict().keys() == base.state_dict().keys()
    kernel = model.attn.in_proj_weight
    merge_in_place(model, ROW)
    assert_close(model(*given)[0], rows)
    unmerge(model)
    assert model.attn.in_proj_weight is kernel
    assert_close(run(model, given, {})[0], expected)
    add_feature(model, "language", "fra", rank=2)
    assert_close(run(model, given, {})[0], expected)


def test_a_base_of_another_kernel_is_told(tmp_path):
    base, model = made(targets=["in_proj_weight"])
    save(model, tmp_path)
    with torch.no_grad():
        base.attn.in_proj_weight.mul_(2)
    with pytest.warns(UserWarning, match="trained on"):
        load(base, tmp_path)


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


def test_others_are_refused_by_name():
    class Own(nn.MultiheadAttention):
        pass

    kinds = {"sizes": nn.MultiheadAttention(D, HEADS, kdim=4), "own": Own(D, HEADS)}
    for name, message in (("sizes", "of other sizes"), ("own", "Own is a subclass")):
        model = nn.ModuleDict({name: kinds[name], "linear": nn.Linear(D, D)})
        with pytest.warns(UserWarning, match=rf"'{name}\.out_proj' .*{message}"):
            adapted = adapt(copy.deepcopy(model), config())
        assert [path for path, _ in flix_layers(adapted)] == ["linear"]
        with pytest.raises(TargetError, match=message):
            adapt(model, config(target_modules=["out_proj"]))
    with pytest.raises(TargetError, match="it is the whole model"):
        adapt(nn.MultiheadAttention(D, HEADS), config(target_modules=["out_proj"]))


def test_exported_packed_projections_open_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base, model = made(targets=["in_proj_weight"])
    export_peft(model, ROW, tmp_path)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double().eval()
    given = inputs("cross")
    expected = run(model, given, {}, rows=[ROW] * N)[0]
    assert_close(served(*given)[0], expected, dtype="float32")
    assert_far(base(*given)[0], expected)


def _loras(tmp_path, **changes):
    """Two LoRAs of PEFT's, and what they give."""
    peft = pytest.importorskip("peft")
    base, _ = made()
    expected = {}
    for number, language in enumerate(("hau", "swa")):
        torch.manual_seed(number)
        settings = peft.LoraConfig(
            r=2 + number, lora_alpha=3, target_modules=["attn"], init_lora_weights=False
        )
        lora = peft.get_peft_model(copy.deepcopy(base), settings).double().eval()
        if changes.get("out") is not None:
            with torch.no_grad():
                lora.get_parameter(
                    "base_model.model.attn.base_layer.out_proj.lora_B.default.weight"
                ).mul_(changes["out"])
        lora.save_pretrained(tmp_path / language)
        expected[language] = lora(*inputs("cross"))[0]
    return base, expected, {n: tmp_path / n for n in expected}


def test_pefts_loras_of_packed_projections_become_features(tmp_path):
    base, expected, folders = _loras(tmp_path, out=0)
    model = import_peft(base, folders, group="language").eval()
    assert [path for path, _ in flix_layers(model)] == [IN]
    encoded = model.flix_config.registry.encode([{"language": n} for n in ("hau", "swa")] * 2)
    found = model(*inputs("cross"), flix_features=encoded)[0]
    for row, name in enumerate(("hau", "swa")):
        assert_close(found[row], expected[name][row], dtype="float32")


def test_outputs_projections_that_peft_adds_twice_are_refused(tmp_path):
    """PEFT 0.21 merges the LoRA of out_proj by hand, and lets out_proj merge itself after that."""
    _, model = made()
    with pytest.raises(AdapterError, match=r"'attn\.out_proj' is .*PEFT \(0\.21\) adds twice"):
        export_peft(model, ROW, tmp_path / "out")
    base, expected, folders = _loras(tmp_path)
    with pytest.raises(AdapterError, match=r"'attn\.out_proj' is .*PEFT \(0\.21\) adds twice"):
        import_peft(copy.deepcopy(base), folders, group="language")
    # It does so still: else the refusal has had its day.
    from safetensors.torch import load_file

    tensors = load_file(folders["hau"] / "adapter_model.safetensors")
    with torch.no_grad():
        for path, stem in ((IN, "attn"), (f"{OUT}.weight", "attn.base_layer.out_proj")):
            a, b = (tensors[f"base_model.model.{stem}.lora_{s}.weight"].double() for s in "AB")
            base.get_parameter(path).add_(b @ a, alpha=3 if path != IN else 1.5)
    assert_close(base(*inputs("cross"))[0], expected["hau"], dtype="float32")
