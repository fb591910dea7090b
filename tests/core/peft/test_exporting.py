"""Compositions in PEFT's form."""

from __future__ import annotations

import numpy as np
import pytest

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.composition import composition, delta
from flix.core.peft.exporting import PeftFacts, as_peft, suffixes, write_peft

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
