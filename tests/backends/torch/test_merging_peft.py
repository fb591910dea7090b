"""Compositions as LoRAs: PEFT opens them with equal outputs, whatever the composition, and vLLM's rules are said."""

from __future__ import annotations

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import ConfigError  # noqa: E402
from flix.backends.torch import adapt, export_peft, merge, remove_feature  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.peft import answer  # noqa: E402
from tests.helpers.registry import config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far, relative  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    ROW,
    adapted,
    ask,
    batch,
    make,
    output,
    randomize,
    routing,
)

MIX = {"language": {"hau": 0.5, "swa": -1.5}, "task": ["ner", "pos"]}
SECOND_LAYER = r".*layers\.1\..*"


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "weights": ("llama", MIX, {}),
    "rslora": ("llama", MIX, {"scaling": "rslora", "alpha": {"task": 3.0, "language": 2.0}}),
    "unequal ranks": (
        "llama",
        ROW,
        {"rank_pattern": {"(q|k)_proj": {"task": 1}, "down_proj": {"language": 9}}},
    ),
    "layers without an update": ("llama", ROW, {"rank_pattern": {SECOND_LAYER: 0, "up_proj": 0}}),
    "embedding and linear": ("llama", MIX, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    "embedding, head and linear": ("llama", ROW, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "Conv1D and embeddings": ("gpt2", MIX, {"target_modules": ["wte", "wpe", "c_attn"]}),
    "encoder, embeddings": ("bert", MIX, {"target_modules": ["word_embeddings", "query", "dense"]}),
    "some layers of a name": ("llama", ROW, {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"}),
    "one feature of rank 0": ("llama", {"language": "yor", "task": "ner"}, {}),
    "encoder-decoder": ("t5", MIX, {"rank_pattern": {"encoder.*": {"task": 1}}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_peft_opens_it_with_equal_outputs(case, tmp_path):
    name, row, changes = CASES[case]
    model = adapted(name, **changes)
    result = export_peft(model, row, tmp_path)
    wanted = ask(model, name, [row] * 4)
    assert_close(answer(name, tmp_path), wanted, dtype="float32")
    assert_far(wanted, output(make(name).eval()(**batch(name))))
    assert result.layers == len(list(flix_layers(model))) and result.error == 0.0
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] == result.rank


def test_implied_features_come_along(tmp_path):
    implies = {("language", "swa"): [("task", "ner")]}
    known = flix.FeatureRegistry({g: list(registry().names(g)) for g in registry().groups}, implies)
    model = adapted(registry=known)
    result = export_peft(model, {"language": "swa"}, tmp_path)
    assert result.rank == 5
    wanted = ask(model, "llama", [{"language": "swa"}] * 4)
    assert_close(answer("llama", tmp_path), wanted, dtype="float32")


def test_a_removed_feature_leaves_the_others_exact(tmp_path):
    model = adapted()
    wanted = ask(model, "llama", [ROW] * 4)
    remove_feature(model, "language", "hau")
    export_peft(model, ROW, tmp_path)
    assert_close(answer("llama", tmp_path), wanted, dtype="float32")
    with pytest.raises(flix.FeatureError, match="has no feature 'hau'; it has: swa"):
        export_peft(model, MIX, tmp_path)


def test_it_equals_the_merged_model(tmp_path):
    model = adapted()
    export_peft(model, MIX, tmp_path)
    merged = merge(model, MIX).eval()
    assert_close(answer("llama", tmp_path), output(merged(**batch("llama"))), dtype="float32")


@pytest.mark.parametrize(
    ("name", "served"), [("llama", True), ("gpt2", False), ("bert", False), ("t5", False)]
)
def test_vllm_s_rules_are_said(name, served, tmp_path):
    model = adapted(name)
    result = export_peft(model, ROW, tmp_path / "swa-pos")
    assert result.serving.ok is served and result.max_lora_rank == 8
    module = f"--lora-modules swa-pos={tmp_path}/swa-pos"
    assert (f"--enable-lora --max-lora-rank 8 {module}" in result.message) is served
    assert ("would not serve" in result.message) is not served


def test_embeddings_are_held_to_the_base(tmp_path):
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    assert export_peft(model, ROW, tmp_path).serving.ok
    model.config.vocab_size = 41  # as if the served base had another
    (problem,) = export_peft(model, ROW, tmp_path).serving.problems
    assert "40 in model.embed_tokens, 41 in the base" in problem.found


def test_compressing_cuts_only_when_asked_and_says_what_it_costs(tmp_path):
    model = adapted()
    wanted = ask(model, "llama", [ROW] * 4)
    result = export_peft(model, ROW, tmp_path, compress_to=3)
    assert result.rank == 3 and 0.01 < result.error < 0.9
    assert f"relative error is {result.error:.2e}" in result.message
    found = relative(answer("llama", tmp_path), wanted)
    assert 1e-4 < found < result.error * 10
    assert export_peft(model, ROW, tmp_path, compress_to=7).error == 0.0  # its rank is 7
    assert_close(answer("llama", tmp_path), wanted, dtype="float32")
    with pytest.raises(ConfigError, match="compress_to must be a whole number of 1 or more"):
        export_peft(model, ROW, tmp_path, compress_to=0)


def test_a_rank_above_vllm_s_largest(tmp_path):
    wide = {"ranks": {"language": 300, "task": 300}, "target_modules": ["q_proj", "embed_tokens"]}
    model = adapted(**wide)
    whole = export_peft(model, ROW, tmp_path)
    assert whole.rank == 600 and whole.max_lora_rank is None
    assert "compress_to=512" in whole.message
    cut = export_peft(model, ROW, tmp_path, compress_to=512)
    assert (
        cut.rank == cut.max_lora_rank == 512 and cut.error < 1e-6
    )  # layers have no more than rank 16
    assert_close(answer("llama", tmp_path), ask(model, "llama", [ROW] * 4), dtype="float32")


def _classifier(seed: int = 0) -> Any:
    from transformers import BertForTokenClassification

    torch.manual_seed(seed)
    settings = make("bert").config
    settings.num_labels = 3
    return BertForTokenClassification(settings).double()


def _with_a_trained_head(only: tuple[str, ...] = ("classifier.weight", "classifier.bias")) -> Any:
    model = adapt(_classifier(), config(target_modules=["query", "dense"]))
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in only:
                parameter.requires_grad_(True).add_(torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("only", [("classifier.weight", "classifier.bias"), ("classifier.bias",)])
def test_a_trained_head_goes_along(only, tmp_path):
    model = _with_a_trained_head(only)
    result = export_peft(model, ROW, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier"
    ]
    opened = peft.PeftModel.from_pretrained(_classifier(), tmp_path).double().eval()
    wanted = ask(model, "bert", [ROW] * 4)
    with torch.no_grad():
        assert_close(output(opened(**batch("bert"))), wanted, dtype="float32")
    (first, *_) = result.serving.problems
    assert "modules_to_save" in first.rule and first.found == "classifier"
    assert result.layers == len(list(flix_layers(model)))


def test_what_peft_s_format_cannot_hold_is_refused(tmp_path):
    model = _with_a_trained_head(("bert.encoder.layer.0.attention.self.query.bias",))
    with pytest.raises(flix.AdapterError, match=r"query\.bias': its module .*query' is adapted"):
        export_peft(model, ROW, tmp_path)
    tied = adapted("gpt2", target_modules=["c_attn"])
    tied.transformer.wte.weight.requires_grad_(True)
    with pytest.raises(flix.AdapterError, match=r"wte\.weight': other modules share it; merge"):
        export_peft(tied, ROW, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_export_opens_in_peft_with_equal_outputs(name, kind, tmp_path):
    peft = pytest.importorskip("peft")
    targets = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "shared"}
    changes = {"rank_pattern": {".*(q|q_proj|query|c_attn)": {"task": 1}}}
    if kind == "embedding":
        if name == "t5":
            pytest.skip("PEFT adapts T5's unused module; see docs/torch.md")
        changes["target_modules"] = [targets[name]]
    model = adapted(name, **changes)
    report = export_peft(model, ROW, tmp_path)
    assert report.rank == 7 and report.max_lora_rank == 8
    served = peft.PeftModel.from_pretrained(make(name), tmp_path).double().eval()
    ids, weights = routing([ROW] * 2)
    inputs = batch(name, rows=2)
    expected = output(model(**inputs, flix_features=ids, flix_weights=weights))
    found = output(served(**inputs))
    assert_close(found, expected, dtype="float32")
    assert_far(found, output(make(name).eval()(**inputs)))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] and not written["use_rslora"]
