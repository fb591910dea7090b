"""Layers with an axis of experts, as data: shapes, values, files, compositions, costs (docs/specification.md §1.4)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import flix
from flix import AdapterError
from flix.core.adapter.adapter import Adapter, LayerShape, checked_pairs, expected_tensors
from flix.core.adapter.base import fingerprint, places
from flix.core.adapter.changes import fresh_pairs, growing
from flix.core.adapter.composition import composition, delta, lora_pair
from flix.core.adapter.flat import flat_layout
from flix.core.adapter.initial import initial_a
from flix.core.adapter.lowrank import nearest
from flix.core.costs import feature_cost, layer_flops, pair_flops, plan
from flix.core.peft.exporting import (
    PeftFacts,
    as_peft,
    cut_to_rank,
    packed_experts,
    unpacked_experts,
    write_peft,
)
from flix.core.peft.vllm import check_vllm
from tests.helpers.registry import config

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
LAYERS = {
    "q": LayerShape(6, 5),
    UP: LayerShape(6, 8, experts=3, active=2),
    DOWN: LayerShape(4, 6, experts=3, active=2),
}
ROW = {"language": {"swa": 0.5, "hau": -2.0}, "task": "pos"}


def made(settings=None, layers=LAYERS) -> Adapter:
    settings = settings or config()
    rng = np.random.default_rng(0)
    shapes = expected_tensors(settings, layers)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes}
    return Adapter(settings, layers, tensors)


def test_a_pair_has_the_axis_of_experts_in_front():
    adapter = made()
    a, b = adapter.pair(UP, ("task", "pos"))
    assert a.shape == (3, 4, 6) and b.shape == (3, 8, 4)
    a, b = adapter.pair(UP, ("language", "yor"))
    assert a.shape == (3, 0, 6) and b.shape == (3, 8, 0)
    name = f"{UP}.A.task.pos"
    with pytest.raises(AdapterError, match=r"must have the shape \[3, 4, 6\], got \[4, 6\]"):
        replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name][0]})
    pairs = {path: dict(fresh_pairs(config(), path, shape)) for path, shape in LAYERS.items()}
    pairs[UP]["task", "pos"] = tuple(side[:2] for side in pairs[UP]["task", "pos"])
    with pytest.raises(AdapterError, match=r"shapes \[3, 4, 6\] and \[3, 8, 4\]"):
        checked_pairs(config(), LAYERS, pairs)


def test_each_expert_starts_as_a_layer_of_its_own():
    settings = config(seed=9)
    for feature, (a, b) in fresh_pairs(settings, UP, LAYERS[UP]).items():
        group, name = feature
        for e in range(3):
            wanted = initial_a(
                seed=9, layer=f"{UP}.{e}", group=group, feature=name, rank=a.shape[1], d_in=6
            )
            np.testing.assert_array_equal(a[e], wanted)
        assert not b.any() and b.shape == (3, 8, a.shape[1])


def test_a_composition_is_that_of_each_expert():
    adapter = made()
    active = composition(adapter.config, ROW)
    a, b = lora_pair(adapter, DOWN, active)
    update = delta(adapter, DOWN, active)
    assert update.shape == (3, 6, 4)
    for e in range(3):
        wanted = sum(
            weight
            * adapter.config.scale(DOWN, f)
            * adapter.pair(DOWN, f)[1][e].astype(np.float64)
            @ adapter.pair(DOWN, f)[0][e].astype(np.float64)
            for f, weight in active
        )
        np.testing.assert_allclose(update[e], wanted, rtol=1e-12)
        np.testing.assert_allclose(b[e] @ a[e].astype(np.float64), wanted, rtol=1e-12)


def test_files_keep_the_axis(tmp_path):
    adapter = made()
    flix.save_adapter(adapter, tmp_path)
    again = flix.load_adapter(tmp_path)
    assert again.layers == adapter.layers
    for name, value in adapter.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], value)
    said = json.loads((tmp_path / "flix_config.json").read_text())
    assert said["layers"]["q"] == {"kind": "linear", "d_in": 6, "d_out": 5}  # as ever
    assert said["layers"][UP] == {"kind": "linear", "d_in": 6, "d_out": 8, "experts": 3}


@pytest.mark.parametrize("experts", [-1, 2.0, True, "3", None, 4])
def test_a_description_of_other_experts_is_refused(tmp_path, experts):
    from flix.core.adapter.description import described, read

    adapter = made()
    said = described(adapter.config, adapter.layers, (), None)
    said["layers"][UP]["experts"] = experts
    if experts == 4:  # well-formed, but not what the tensors are
        with pytest.raises(AdapterError, match=r"must have the shape \[4, 1, 6\]"):
            Adapter(adapter.config, read(said, "it").layers, adapter.tensors)
        return
    with pytest.raises(AdapterError, match="describes the layer"):
        read(said, "it")
    said["layers"][UP] = {"kind": "embedding", "d_in": 6, "d_out": 8, "experts": 3}
    with pytest.raises(AdapterError, match="describes the layer"):
        read(said, "it")


def test_adapters_are_renamed_chosen_and_combined():
    adapter = made()
    moved = adapter.renamed({UP: "x.gate_up_proj"})
    np.testing.assert_array_equal(
        moved.tensors["x.gate_up_proj.A.task.pos"], adapter.tensors[f"{UP}.A.task.pos"]
    )
    one = flix.select_features(adapter, {"language": "swa"})
    rest = flix.remove_feature(adapter, "language", "swa")
    both = flix.combine_adapters([rest, flix.rename_feature(one, "language", "swa", "swh")])
    np.testing.assert_array_equal(
        both.tensors[f"{DOWN}.B.language.swh"], adapter.tensors[f"{DOWN}.B.language.swa"]
    )
    fewer = {**LAYERS, UP: replace(LAYERS[UP], experts=2)}
    with pytest.raises(AdapterError, match=r"linear 3 experts of 6 -> 8 in .* linear 2 experts"):
        flix.combine_adapters([adapter, made(layers=fewer)])


def test_vectors_hold_experts_one_after_the_other():
    settings = config()
    layout = flat_layout(settings, LAYERS)
    i = settings.registry.id("task", "pos")
    assert layout.sizes[i] == (4 * 6, 4 * 5, 3 * 4 * 6, 3 * 4 * 8, 3 * 4 * 4, 3 * 4 * 6)
    adapter = made(settings)
    pairs = {path: {("task", "pos"): adapter.pair(path, ("task", "pos"))} for path in LAYERS}
    vector = layout.packed({("task", "pos"): i}, pairs.items(), [("task", "pos")], np.float32)[i]
    for path, (a, b) in layout.pairs(vector, i).items():
        np.testing.assert_array_equal(a, pairs[path]["task", "pos"][0])
        np.testing.assert_array_equal(b, pairs[path]["task", "pos"][1])
    start = layout.starts[i][3]
    np.testing.assert_array_equal(
        vector[start : start + 32].reshape(4, 8), pairs[UP]["task", "pos"][1][0].T
    )


def test_a_feature_near_others_is_so_in_each_expert():
    adapter = made()
    growth = growing(adapter.config, "language", "new", 2, init_from=["swa", "hau"])
    pairs = {
        path: {f: adapter.pair(path, f) for f in growth.origins if adapter.config.rank(path, f)}
        for path in LAYERS
    }
    a, b = growth.change(LAYERS, pairs).arriving["language", "new"][UP]
    assert a.shape == (3, 2, 6) and b.shape == (3, 8, 2)
    for e in range(3):
        mean = [
            (pairs[UP][f][0][e], adapter.config.scale(UP, f) / 2 * pairs[UP][f][1][e])
            for f in growth.origins
        ]
        first, second, _ = nearest(
            np.concatenate([x for x, _ in mean]), np.concatenate([y for _, y in mean], 1), 2
        )
        np.testing.assert_allclose(b[e] @ a[e], second @ first, atol=1e-5)


def test_costs_count_all_experts_and_those_that_a_token_is_sent_to():
    settings = config(rank_pattern={r"experts\..*": {"language": 1}})
    assert feature_cost(settings, LAYERS, ("language", "swa")).parameters == (
        3 * (6 + 5) + 3 * 1 * (6 + 8) + 3 * 1 * (4 + 6)
    )
    assert pair_flops(LAYERS[UP], 4) == 2 * 2 * 4 * (6 + 8)
    assert layer_flops(LAYERS[UP]) == 2 * 2 * 6 * 8
    assert plan(settings, LAYERS).base_flops == 2 * (6 * 5 + 2 * 6 * 8 + 2 * 4 * 6)


def test_the_fingerprint_looks_at_all_experts():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 8, 6))
    where = places(LAYERS[UP])
    assert where.experts is not None and set(where.experts) == {0, 1, 2}
    assert places(LAYERS["q"]).experts is None

    def told(kernel, shape=LAYERS[UP]):
        values = kernel[where.experts, where.rows, where.columns]
        return fingerprint({UP: shape}, {UP: values})

    other = kernel.copy()
    other[where.experts[5], where.rows[5], where.columns[5]] += 1
    assert told(kernel) == told(kernel) != told(other)
    assert told(kernel) != told(kernel, replace(LAYERS[UP], experts=4))


def test_peft_has_experts_as_parameters_of_their_module():
    adapter = made()
    active = composition(adapter.config, ROW)
    settings, tensors = as_peft(adapter, active)
    assert settings["target_modules"] == ["q"]
    assert sorted(settings["target_parameters"]) == [DOWN, UP]
    rank = settings["r"]
    stems = {DOWN: "mlp.experts", UP: "mlp.experts.base_layer"}  # the last parameter outermost
    for path, stem in stems.items():
        a = tensors[f"base_model.model.{stem}.lora_A.weight"]
        b = tensors[f"base_model.model.{stem}.lora_B.weight"]
        assert a.shape == (3 * rank, LAYERS[path].d_in) and b.shape == (
            LAYERS[path].d_out,
            3 * rank,
        )
        # PEFT's own words: einsum("o r e, e r i -> e o i").
        found = np.einsum(
            "ore,eri->eoi", b.reshape(len(b), rank, 3), a.reshape(3, rank, -1), dtype=np.float64
        )
        np.testing.assert_allclose(found, delta(adapter, path, active), atol=1e-5)
        again = packed_experts(*unpacked_experts(a, b, rank))
        np.testing.assert_array_equal(again[0], a)
        np.testing.assert_array_equal(again[1], b)
    report = check_vllm(settings, {n: t.shape for n, t in tensors.items()}, model="m")
    assert len(report.problems) == 1 and UP in str(report) and "experts is not known" in str(report)
    with pytest.raises(AdapterError, match="one expert, which PEFT does not read"):
        as_peft(made(layers={UP: replace(LAYERS[UP], experts=1)}), active)


def test_a_cut_is_the_nearest_in_each_expert():
    adapter = made()
    active = composition(adapter.config, ROW)
    settings, tensors = as_peft(adapter, active)
    cut, fewer, error = cut_to_rank(settings, tensors, 2)
    assert cut["r"] == 2 and 0 < error < 1
    stem, lost, norm = "base_model.model.mlp.experts", 0.0, 0.0
    a, b = unpacked_experts(fewer[f"{stem}.lora_A.weight"], fewer[f"{stem}.lora_B.weight"], 2)
    for e, update in enumerate(delta(adapter, DOWN, active)):
        values = np.linalg.svd(update, compute_uv=False)
        gap = np.linalg.norm(update - b[e].astype(np.float64) @ a[e])
        assert gap == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)
        lost, norm = lost + gap**2, norm + np.sum(values**2)
    assert lost < norm


def test_layers_that_peft_takes_for_experts_are_refused_by_name():
    facts = PeftFacts([], "DeepseekV3ForCausalLM", {}, family="qwen2_moe")
    with pytest.raises(
        AdapterError, match=r"DeepseekV3ForCausalLM named 'gate_proj' for its experts'"
    ):
        facts.check(["layers.0.mlp.gate_proj", "layers.0.q_proj"])
    facts.check(["layers.0.q_proj"])
    replace(facts, family=None).check(["layers.0.mlp.gate_proj"])


def test_what_peft_has_of_experts_comes_back(tmp_path):
    adapter = made()
    active = composition(adapter.config, ROW)
    settings, tensors = as_peft(adapter, active)
    write_peft(tmp_path / "a", settings, tensors)
    again = flix.from_peft({"one": tmp_path / "a"}, "task")
    assert dict(again.layers) == dict(adapter.layers)
    for path in adapter.layers:
        found = delta(again, path, ((("task", "one"), 1.0),))
        np.testing.assert_allclose(found, delta(adapter, path, active), atol=1e-5)
    # By the parameters' names alone, as people write them; a dense layer among them stays one.
    short = {**settings, "target_parameters": ["down_proj", "gate_up_proj"]}
    write_peft(tmp_path / "b", short, tensors)
    assert dict(flix.from_peft({"one": tmp_path / "b"}, "task").layers) == dict(adapter.layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_parameters": ["experts.down_proj"]},
            "the factors of 2 parameters, .*names down_proj: it is not known",
        ),
        (
            {"target_parameters": ["experts.one", "experts.two"]},
            "names one, two: it is not known which are whose",
        ),
        ({"r": 7}, r"needs lora_A \[experts \* r, d_in\] .* with r = 7"),
    ],
)
def test_experts_of_which_a_file_says_too_little(tmp_path, changes, message):
    adapter = made()
    settings, tensors = as_peft(adapter, composition(adapter.config, ROW))
    write_peft(tmp_path / "a", {**settings, **changes}, tensors)
    with pytest.raises(flix.AdapterError, match=message):
        flix.from_peft({"one": tmp_path / "a"}, "task")
