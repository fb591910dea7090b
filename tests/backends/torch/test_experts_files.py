"""The ways out of adapted experts, and the life of their features: files, merging, PEFT, copies, pages."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import AdapterError, TargetError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    add_feature,
    export_peft,
    freeze,
    import_peft,
    load,
    load_features,
    merge,
    merge_in_place,
    page,
    remove_feature,
    rename_feature,
    save,
    share_base,
    summary,
    trainable_parameters,
    unmerge,
)
from flix.backends.torch.experts import FlixExperts  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.mixtures import (  # noqa: E402
    COMPOSITIONS,
    ONLY,
    adapted,
    answers,
    by_rows,
    kernels,
    make,
)
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import ROW, output, parameters_of, randomize  # noqa: E402
from tests.helpers.zoo import EXPERTS, build, inputs_of  # noqa: E402


@pytest.mark.parametrize("name", EXPERTS)
def test_files_hold_the_axis_of_experts(name, tmp_path):
    model = adapted(name)
    save(model, tmp_path)
    adapter = flix.load_adapter(tmp_path)
    said = json.loads((tmp_path / "flix_config.json").read_text())
    assert said["version"] == 2
    for path, kernel in kernels(model).items():
        shape = kernel.shape_of(kernel)
        assert adapter.layers[path] == shape and said["layers"][path]["experts"] == shape.experts
        a, b = adapter.pair(path, ("task", "pos"))
        assert a.shape == (shape.experts, 4, shape.d_in)
        assert b.shape == (shape.experts, shape.d_out, 4)
    fresh = load(make(name), tmp_path).eval()
    assert torch.equal(answers(fresh, name), answers(model, name))
    assert adapter.base.fingerprint
    other = make(name)
    with torch.no_grad():
        other.get_parameter(next(iter(kernels(model)))).add_(1)
    with pytest.warns(UserWarning, match="other values"):
        load(other, tmp_path)


def test_an_adapter_of_other_experts_is_refused_by_name(tmp_path):
    save(adapted(target_modules=ONLY), tmp_path)
    with pytest.raises(AdapterError, match=r"gate_up_proj' is linear 6 experts of 16 -> 24 in the"):
        load(make(num_experts=5), tmp_path)
    with pytest.raises(
        AdapterError, match=r"has no layer 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"
    ):
        load(build("llama").double(), tmp_path)


def test_merge_in_place_and_back():
    model = adapted()
    plain = {n: p.detach().clone() for n, p in model.named_parameters() if "flix_" not in n}
    wanted = answers(model, rows=[ROW])
    merge_in_place(model, ROW)
    with torch.no_grad():
        assert_close(output(model(**inputs_of("qwen3-moe", rows=1))), wanted)
    unmerge(model)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in plain.items())
    assert_close(answers(model, rows=[ROW]), wanted)


def test_a_merged_model_is_plain():
    merged = merge(adapted(), ROW)
    assert type(merged) is type(make())
    assert not any(isinstance(m, FlixExperts) for m in merged.modules())
    assert not [n for n, _ in merged.named_parameters() if "flix" in n]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_peft_opens_experts_by_target_parameters(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(name, target_modules=ONLY, rank_pattern={r"down_proj": {"language": 1}})
    mix = {"language": {"hau": 0.5, "swa": -1.5}, "task": "pos"}
    report = export_peft(model, mix, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(written["target_parameters"]) == sorted(kernels(model))
    assert written["target_modules"] == []
    assert report.rank == 8 and not report.serving.ok
    assert "target_parameters" in report.message
    opened = peft.PeftModel.from_pretrained(make(name), tmp_path).double().eval()
    inputs = inputs_of(name)
    with torch.no_grad():
        found = output(opened(**inputs))
    assert_close(found, answers(model, name, rows=[mix] * 4, **inputs), dtype="float32")
    assert_far(found, output(make(name).eval()(**inputs)))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_what_peft_trained_of_experts_becomes_a_feature(name, tmp_path):
    """PEFT's own file, each row under its LoRA or the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], rank_pattern={"q_proj": 3},
        target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(make(name), settings).double().eval()
    wrapped.save_pretrained(tmp_path / "one")
    model = import_peft(make(name), {"one": tmp_path / "one"}, "task").double().eval()
    assert {*kernels(model)} == {n for n, p in make(name).named_parameters() if p.dim() == 3}
    inputs = inputs_of(name)
    ids = torch.tensor([[0], [-1], [0], [0]])
    with torch.no_grad():
        found, wanted = output(model(**inputs, flix_features=ids)), output(wrapped(**inputs))
        base = output(make(name).double().eval()(**inputs))
    assert_close(found[[0, 2, 3]], wanted[[0, 2, 3]], dtype="float32")
    assert_close(found[1], base[1], dtype="float32")
    assert_far(wanted, base)


def test_an_export_may_be_cut_expert_by_expert(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(target_modules=ONLY)
    report = export_peft(model, ROW, tmp_path, compress_to=2)
    assert report.rank == 2 and 0 < report.error < 1
    opened = peft.PeftModel.from_pretrained(make(), tmp_path).double().eval()
    inputs = inputs_of("qwen3-moe")
    with torch.no_grad():
        base, wanted = output(make().eval()(**inputs)), answers(model, rows=[ROW] * 4)
        assert (output(opened(**inputs)) - wanted).norm() < (base - wanted).norm()


def test_peft_does_not_read_one_expert(tmp_path):
    model = adapted(build_with={"num_experts": 1, "num_experts_per_tok": 1}, target_modules=ONLY)
    assert_close(answers(model), by_rows(model))
    with pytest.raises(AdapterError, match="one expert, which PEFT does not read"):
        export_peft(model, ROW, tmp_path)


def test_ranks_and_counts():
    pattern = {r"experts\..*": {"language": 1, "task": 0}}
    model, plain = adapted(rank_pattern=pattern), adapted(exclude_modules=ONLY)
    more = 2 * 6 * ((16 + 24) + (12 + 16))  # two layers of six experts
    for feature in ("hau", "swa", "yor", "zul"):
        extra = summary(model).features["language", feature]
        assert extra - summary(plain).features["language", feature] == more
    assert summary(model).features["task", "pos"] == summary(plain).features["task", "pos"]
    assert sum(p.numel() for p in parameters_of(model).values()) == sum(
        summary(model).features.values()
    )
    assert_close(answers(model), by_rows(model))


def test_features_join_leave_and_are_renamed(tmp_path):
    model = adapted()
    before = answers(model)
    save(model, tmp_path / "all", features=[("language", "swa")])
    add_feature(model, "language", "ibo", rank=2)
    assert torch.equal(answers(model), before)
    add_feature(model, "language", "twi", rank=3, init_from="swa")
    assert_close(
        answers(model, rows=[{"language": "twi"}]), answers(model, rows=[{"language": "swa"}])
    )
    add_feature(model, "language", "fon", rank=2, init_from=["swa", "zul"])
    a, b = next(iter(kernels(model).values())).flix_A, next(iter(kernels(model).values())).flix_B
    for e in range(6):  # the nearest of its rank to the mean
        mean = sum(
            s * (b["language", n][e] @ a["language", n][e]) / 2 for n, s in (("swa", 1), ("zul", 1))
        )
        values = torch.linalg.svdvals(mean)
        own = b["language", "fon"][e] @ a["language", "fon"][e]
        assert_close((own - mean).norm(), values[2:].norm())
    rename_feature(model, "language", "zul", "xho")
    remove_feature(model, "language", "hau")
    row = [{"language": "xho", "task": "ner"}]
    assert_close(answers(model, rows=row), by_rows(model, rows=row))
    other = adapted()
    remove_feature(other, "language", "swa")
    load_features(other, tmp_path / "all")
    assert torch.equal(answers(other), before)
    freeze(model, [("language", "swa")])
    assert not parameters_of(model)["language", "swa"].requires_grad


def test_layers_of_experts_join_with_features(tmp_path):
    save(adapted(), tmp_path, features=[("language", "swa")])
    model = adapted(exclude_modules=ONLY)
    before = answers(model)
    remove_feature(model, "language", "swa")
    assert not any(n.endswith(":experts") for n, _ in model.named_parameters())
    load_features(model, tmp_path)
    assert len(kernels(model)) == 4
    assert "flix_bank.language:hau:experts" in dict(model.named_parameters())
    found = answers(model)
    assert_close(found, by_rows(model))
    assert torch.equal(found[1:], before[1:])
    assert_far(found[:1], before[:1])


def test_copies_pickles_and_twins():
    model = adapted()
    wanted = answers(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answers(twin), wanted)
        held = next(iter(kernels(twin).values()))
        assert held.module is not next(iter(kernels(model).values())).module
        assert held.flix_state is twin.flix_state
    other = adapt(share_base(model), config())
    with torch.no_grad():
        assert torch.equal(answers(other), output(make().eval()(**inputs_of("qwen3-moe"))))
    assert torch.equal(answers(model), wanted)


def test_pages_of_experts():
    model = adapted(target_modules=ONLY)
    wanted = answers(model)
    largest = max(p.numel() * p.element_size() for p in parameters_of(model).values())
    page(model, 6 * largest)
    assert torch.equal(answers(model), wanted)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_absent_features_keep_their_bits(optimizer):
    model = adapted(target_modules=ONLY, feature_dropout=flix.FeatureDropout(p=0.0)).train()
    steps = {"lr": 0.1, "weight_decay": 0.1}
    chosen = optimizer(trainable_parameters(model), **steps)
    ids = torch.tensor([[0, 4], [1, 4]])
    before = {f: p.detach().clone() for f, p in parameters_of(model).items()}
    for used in (torch.tensor([[3, 5], [3, 5]]), ids, ids):
        chosen.zero_grad()
        output(model(**inputs_of("qwen3-moe", rows=2), flix_features=used)).sum().backward()
        if used is not ids:
            before = {f: p.detach().clone() for f, p in parameters_of(model).items()}
            chosen.zero_grad()
            continue
        chosen.step()
    for feature, p in parameters_of(model).items():
        used = feature in {("language", "hau"), ("language", "swa"), ("task", "ner")}
        assert torch.equal(p, before[feature]) != used


def test_initial_values_are_those_of_each_expert_by_its_own_path():
    from flix.core.adapter.initial import initial_a

    model = adapt(make(), config(seed=5))
    path, kernel = next(iter(kernels(model).items()))
    a = kernel.flix_A["task", "pos"]
    for e in (0, 3):
        wanted = initial_a(
            seed=5, layer=f"{path}.{e}", group="task", feature="pos", rank=4, d_in=16
        )
        assert torch.equal(a[e], torch.from_numpy(wanted).double())
    assert not kernel.flix_B["task", "pos"].any()


@pytest.mark.parametrize("before", [True, False])
def test_experts_that_accelerate_offloads(before):
    accelerate = pytest.importorskip("accelerate")
    wanted = answers(adapted(dtype=torch.float32))
    if before:
        base = make(dtype=torch.float32)
        accelerate.cpu_offload(base, torch.device("cpu"))
        model = adapt(base, config()).eval()
        randomize(model)
    else:
        model = adapted(dtype=torch.float32)
        accelerate.cpu_offload(model, torch.device("cpu"))
    assert next(iter(kernels(model).values())).weight.is_meta
    assert_close(answers(model), wanted, dtype="float32")
    with pytest.raises(TargetError, match="has no values here"):
        merge(model, ROW)


def test_what_is_unfrozen_of_experts_trains_and_is_saved(tmp_path):
    model = adapted("gpt-oss").train()
    name = "model.layers.0.mlp.experts.down_proj"
    bias, kernel = (model.get_parameter(name + end).requires_grad_(True) for end in ("_bias", ""))
    encoded = model.flix_config.registry.encode(COMPOSITIONS)
    output(model(**inputs_of("gpt-oss"), flix_features=encoded)).sum().backward()
    assert bias.grad.any() and kernel.grad.any() and kernel.grad.shape == kernel.shape
    with pytest.raises(AdapterError, match="is the kernel of the adapted layer"):
        save(model, tmp_path)
    kernel.requires_grad_(False)
    with torch.no_grad():
        bias.add_(1)
    save(model, tmp_path)
    wanted = answers(model.eval(), "gpt-oss")
    assert torch.equal(answers(load(make("gpt-oss"), tmp_path).eval(), "gpt-oss"), wanted)


def test_a_plan_counts_experts_and_those_that_a_token_is_sent_to(tmp_path):
    from flix.core.costs import plan
    from flix.tasks import model_layers

    make().save_pretrained(tmp_path)
    layers = model_layers(str(tmp_path), None, "all-linear", ())
    model = adapted()
    assert layers == {path: layer.shape_of(layer) for path, layer in flix_layers(model)}
    assert {s.active for s in layers.values() if s.experts} == {3}
    assert plan(config(), layers).mixture.parameters == sum(summary(model).features.values())
