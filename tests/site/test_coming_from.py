"""The page docs/coming-from-peft.md: what it names exists, and what it calls the same is the same."""

from __future__ import annotations

import dataclasses
import re

import pytest

pytest.importorskip("peft")

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flix
from flix.backends import torch as backend
from tests.site.public import ROOT

PAGE = (ROOT / "docs" / "coming-from-peft.md").read_text(encoding="utf-8")
FIELDS = PAGE.split("## The configuration, field by field")[1].split("\n## ")[0]
CALLS = PAGE.split("## The calls, one by one")[1].split("\n## ")[0]
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval()


def cells(table):
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [row[0] for row in rows], [row[1] for row in rows]


def config(**more):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **more)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two LoRAs that PEFT wrote, the model that has both, and the same as features."""
    folder = tmp_path_factory.mktemp("loras")
    model = peft.get_peft_model(base(), config(), adapter_name="one")
    model.add_adapter("two", config())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    model.save_pretrained(folder)
    ours = backend.import_peft(base(), {n: folder / n for n in ("one", "two")}, group="task")
    return model.eval(), ours.eval()


def logits(model, rows=None):
    with torch.no_grad():
        if rows is None:
            return model(TOKENS).logits
        ids = model.flix_config.registry.encode(rows)
        return model(TOKENS, flix_features=ids).logits


def test_fields_of_both_exist():
    theirs, ours = cells(FIELDS)
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    named = {word for cell in theirs for word in re.findall(r"`(\w+)", cell) if "..." not in word}
    assert len(named) >= 15 and {"LoraConfig"} <= named
    assert named - {"LoraConfig"} <= known
    own = {field.name for field in dataclasses.fields(flix.FlixConfig)}
    assert {w for cell in ours for w in re.findall(r"`(\w+)=", cell)} <= own


def test_calls_of_both_exist():
    theirs, ours = cells(CALLS)
    methods = {word for cell in theirs for word in re.findall(r"model\.(\w+)\(", cell)}
    model = peft.get_peft_model(base(), config())
    assert len(methods) >= 13 and [name for name in methods if not hasattr(model, name)] == []
    verbs = {word for cell in ours for word in re.findall(r"(?<![.\w])(\w+)\(", cell)}
    assert verbs - {"FlixTrainer", "model", "print"} <= set(backend.__all__) and len(verbs) >= 15


def test_adapters_by_row_are_features_by_row(loras):
    theirs, ours = loras
    with torch.no_grad():
        wanted = theirs(TOKENS, adapter_names=["one", "two"]).logits
    torch.testing.assert_close(logits(ours, [{"task": "one"}, {"task": "two"}]), wanted)


def test_an_active_adapter_is_that_name_in_every_row(loras):
    theirs, ours = loras
    theirs.set_adapter("two")
    torch.testing.assert_close(logits(ours, [{"task": "two"}] * 2), logits(theirs))


def test_weighted_adapters_are_weights_in_the_row(loras):
    theirs, ours = loras
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.3], "ab", combination_type="cat")
    theirs.set_adapter("ab")
    torch.testing.assert_close(
        logits(ours, [{"task": {"one": 0.7, "two": 0.3}}] * 2), logits(theirs)
    )
    theirs.set_adapter("one")
    theirs.delete_adapter("ab")


def test_off_is_off(loras):
    theirs, ours = loras
    with theirs.disable_adapter():
        wanted = logits(theirs)
    with backend.disable(ours):
        assert torch.equal(logits(ours), wanted)
    torch.testing.assert_close(logits(ours, [{"task": None}] * 2), wanted)


def test_merged_is_merged(loras):
    theirs, ours = loras
    theirs.set_adapter("one")
    theirs.merge_adapter(["one"])
    merged = logits(theirs)
    theirs.unmerge_adapter()
    torch.testing.assert_close(logits(backend.merge(ours, {"task": "one"})), merged)


def test_the_pattern_for_some_layers_takes_those_layers():
    (pattern,) = re.findall(r'`r"(.*?)"`', FIELDS)
    pattern = (
        pattern.replace("\\|", "|").replace("block", "layers").replace("(0|1)", "(1)") + "_proj"
    )
    registry = flix.FeatureRegistry({"task": ["a"]})
    made = flix.FlixConfig(registry=registry, ranks=2, target_modules=pattern)
    layers = backend.summary(backend.adapt(base(), made)).layers
    assert layers == ("model.layers.1.self_attn.q_proj",)
    with pytest.raises(flix.RoutingError, match="without routing"):
        backend.adapt(base(), made)(TOKENS)


def test_defaults_are_what_the_page_says():
    registry = flix.FeatureRegistry({"task": ["a"]})
    made = flix.FlixConfig(registry=registry, ranks=8)
    assert made.scale("any", ("task", "a")) == 1.0 and made.target_modules == "all-linear"
    assert peft.LoraConfig().lora_alpha == peft.LoraConfig().r
