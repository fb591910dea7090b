"""Compositions in PEFT's form."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.composition import composition, delta
from flix.core.peft.exporting import PeftFacts, as_peft, suffixes, with_modules, write_peft
from flix.core.peft.importing import read_peft
from tests.helpers.beside import writing
from tests.helpers.stops import leftovers, stops

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["n.e.r", "ñ ü"]})
LAYERS = {"a.q": LayerShape(5, 3), "emb": LayerShape(7, 4, "embedding")}


def adapter(dtype=np.float32, **changes) -> Adapter:
    settings = {"ranks": {"language": {"hau": 2, "swa": 0}, "task": 3}, **changes}
    config = FlixConfig(registry=REGISTRY, **settings)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(dtype) for n, s in expected_tensors(config, LAYERS)}
    return Adapter(config, LAYERS, tensors)


def test_peft_form_pads_to_one_rank_and_is_exact(tmp_path):
    original = adapter(rank_pattern={"a.q": {"task": 1}})
    active = composition(original.config, {"language": "hau", "task": "ñ ü"})
    config, tensors = as_peft(original, active)
    assert config["r"] == config["lora_alpha"] == 5
    a, b = tensors["base_model.model.a.q.lora_A.weight"], tensors["base_model.model.a.q.lora_B.weight"]  # fmt: skip
    assert a.shape == (5, 5) and b.shape == (3, 5)
    np.testing.assert_allclose(b @ a, delta(original, "a.q", active), rtol=1e-5, atol=1e-6)
    assert tensors["base_model.model.emb.lora_embedding_A"].shape == (5, 7)
    report = write_peft(tmp_path, config, tensors)
    assert report.max_lora_rank == 8 and "got emb" in report.message  # no name that vLLM knows
    with pytest.raises(AdapterError, match="language=swa have rank 0 in every layer"):
        as_peft(original, ((("language", "swa"), 1.0),))


def test_alphas_by_layer_go_into_b():
    """Servers read no ``alpha_pattern``, so a LoRA has one alpha, and each layer's scale is in its B."""
    original = adapter(alpha=2.0, alpha_pattern={"a.q": {"task": 12.0}}, scaling="rslora")
    active = composition(original.config, {"language": "hau", "task": "ñ ü"})
    config, tensors = as_peft(original, active)
    assert config["lora_alpha"] == config["r"] and "alpha_pattern" not in config
    a, b = (tensors[f"base_model.model.a.q.lora_{part}.weight"] for part in "AB")
    pairs = [original.pair("a.q", f) for f, _ in active]
    wanted = sum(
        s * pair[1] @ pair[0] for s, pair in zip((2 / 2**0.5, 12 / 3**0.5), pairs, strict=True)
    )
    np.testing.assert_allclose(b @ a, wanted, rtol=1e-5, atol=1e-6)


def test_layers_are_named_by_their_last_part_where_it_is_exact():
    modules = ["", "a", "a.q", "a.v", "b", "b.q", "b.v", "b.out"]
    assert suffixes(["a.q", "b.q", "b.out"], modules) == ["out", "q"]
    assert suffixes(["a.q", "b.q", "b.v"], modules) == ["q", "b.v"]


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("BertModel", None),
    ],
)
def test_the_task_follows_from_the_model_s_class(architecture, task):
    assert PeftFacts([], architecture, {}).task_type == task


def exported(seed: int, **row):
    """A LoRA and its configuration."""
    original = adapter()
    tensors = {n: t + np.float32(seed) for n, t in original.tensors.items()}
    original = Adapter(original.config, original.layers, tensors)
    return as_peft(original, composition(original.config, row))


@pytest.mark.parametrize("tidy", [True, False])
@pytest.mark.parametrize("change", ["other ranks", "other values", "nothing there"])
def test_a_stop_anywhere_leaves_one_version(tmp_path, change, tidy):
    folder = tmp_path / "lora"
    old = exported(1, language="hau")
    new = exported(2, language="hau", **({"task": "ñ ü"} if change == "other ranks" else {}))

    def opened():
        """Both files, as any program reads them."""
        config = json.loads((folder / "adapter_config.json").read_text())
        return config, load_file(folder / "adapter_model.safetensors")

    def is_(found, wanted):
        return found[0] == wanted[0] and all(
            np.array_equal(found[1][n], t) for n, t in wanted[1].items()
        )

    def start():
        shutil.rmtree(folder, ignore_errors=True)
        if change != "nothing there":
            write_peft(folder, *old)
            (folder / "README.md").write_text("mine")

    start()
    seen = set()
    for stopped in stops(lambda: write_peft(folder, *new), tidy):
        if change != "nothing there":
            found = opened()
            assert is_(found, new) or is_(found, old), stopped
            seen.add("new" if is_(found, new) else "old")
            assert read_peft(folder).pairs and (folder / "README.md").read_text() == "mine"
        elif (folder / "adapter_config.json").exists():
            assert is_(opened(), new)
        assert len(leftovers(folder)) <= 1
        if stopped is not None:
            start()
    assert is_(opened(), new) and leftovers(folder) == []
    assert change == "nothing there" or seen == {"old", "new"}


def test_a_reader_beside_writers_of_other_ranks_reads_whole_loras(tmp_path):
    loras = [exported(1, language="hau"), exported(2, language="hau", task="ñ ü")]
    write_peft(tmp_path / "lora", *loras[0])
    reads, ranks, until = 0, set(), time.monotonic() + 60
    with writing(*(partial(write_peft, tmp_path / "lora", *lora) for lora in loras)):
        # A lock is fair to nobody: one writer may have many turns.
        while reads < 300 or (len(ranks) < 2 and time.monotonic() < until):
            reads += 1
            a, b = read_peft(tmp_path / "lora").pairs["a.q"]
            _, tensors = loras[a.shape[0] != 2]
            np.testing.assert_array_equal(a, tensors["base_model.model.a.q.lora_A.weight"])
            np.testing.assert_array_equal(b, tensors["base_model.model.a.q.lora_B.weight"])
            ranks.add(a.shape[0])
    assert ranks == {2, 5} and {p.name for p in tmp_path.iterdir()} == {"lora"}


def test_layers_that_peft_computes_otherwise_are_refused():
    facts = PeftFacts([], "BertModel", {}, unread={"a.q": "is read by PEFT as something else"})
    with pytest.raises(AdapterError, match=r"layer 'a\.q' is read by PEFT as something else: .*leave the layer out \(exclude_modules\)"):  # fmt: skip
        facts.check(["a.q"])
    PeftFacts([], "BertModel", {}).check(["a.q", "a.gate"])


@pytest.mark.parametrize(("family", "layer"), [("mixtral", "a.w1"), ("qwen2_moe", "a.mlp.up_proj")])
def test_layers_that_peft_takes_for_experts_are_refused(family, layer):
    facts = PeftFacts([], "OlmoeForCausalLM", {}, family=family)
    name = layer.rpartition(".")[2]
    with pytest.raises(AdapterError, match=f"PEFT takes layers of OlmoeForCausalLM named '{name}' for its experts'"):  # fmt: skip
        facts.check(["a.q", layer])
    facts.check(["a.q"])


def test_whole_modules_stand_beside_the_lora():
    config, tensors = exported(1, language="hau")
    state = {"weight": np.ones((2, 3), "f4"), "bias": np.zeros(2, "f4")}
    both, all_tensors = with_modules(config, tensors, {"head.out": state})
    assert both == {**config, "modules_to_save": ["head.out"]}
    assert set(all_tensors) - set(tensors) == {
        "base_model.model.head.out.weight",
        "base_model.model.head.out.bias",
    }
    assert all_tensors["base_model.model.head.out.weight"] is state["weight"]
    assert with_modules(config, tensors, {}) == (config, tensors)
    assert config["modules_to_save"] is None
