"""LoRAs made by PEFT become features: the model answers as PEFT's does, each row under its own, and trains on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import AdapterError, FeatureError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    export_peft,
    import_peft,
    load,
    save,
)
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.peft import answer, fill, make_lora  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import ask, batch, live_pairs, make, output, randomize  # noqa: E402

# Models are in float64 here, and their LoRAs stored in float32.

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"r": 2, "target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"k_proj": 1, r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"down_proj": 3, "^model.layers.0.self_attn.q_proj": 20},
        },
    ),
    "rslora": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 9},
            "target_modules": ["q_proj", "v_proj"],
        },
    ),
    "embedding": ("llama", {"r": 3, "lora_alpha": 9, "target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"r": 3, "target_modules": ["lm_head", "o_proj"]}),
    "one layer": (
        "llama",
        {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    ),
    "Conv1D": ("gpt2", {"r": 4, "lora_alpha": 2, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}),
    "Conv1D, embeddings": (
        "gpt2",
        {"r": 2, "fan_in_fan_out": True, "target_modules": ["wte", "wpe", "c_fc"]},
    ),
    "encoder": ("bert", {"r": 4, "target_modules": ["query", "value", "word_embeddings"]}),
    "encoder-decoder": ("t5", {"r": 4, "target_modules": ["q", "v", "wo"]}),
    "gaussian start": ("bert", {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["key"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_lora_becomes_a_feature_and_comes_out_again(case, tmp_path):
    name, settings = CASES[case]
    wanted = make_lora(name, tmp_path / "lora", **settings)
    model = import_peft(make(name), {"ner": tmp_path / "lora"}, "task")
    found = ask(model, name, [{"task": "ner"}] * 4)
    assert_close(found, wanted, dtype="float32")
    assert_far(wanted, output(make(name).eval()(**batch(name))))
    export_peft(model, {"task": "ner"}, tmp_path / "again")
    assert_close(answer(name, tmp_path / "again"), wanted, dtype="float32")
    returned = import_peft(make(name), {"ner": tmp_path / "again"}, "task")
    assert_close(ask(returned, name, [{"task": "ner"}] * 4), wanted, dtype="float32")


THREE = {
    "ner": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "pos": {"r": 2, "use_rslora": True, "target_modules": ["embed_tokens", "v_proj"]},
    "topic": {
        "r": 3,
        "target_modules": ["down_proj", "q_proj"],
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"down_proj": 1},
    },
}


def three(tmp_path):
    wanted = {
        name: make_lora("llama", tmp_path / name, seed, **settings)
        for seed, (name, settings) in enumerate(THREE.items())
    }
    return {name: tmp_path / name for name in THREE}, wanted


def test_several_become_a_group_in_one_mixed_batch(tmp_path):
    folders, wanted = three(tmp_path)
    model = import_peft(make("llama"), folders, "task")
    assert model.flix_config.registry.features == tuple(("task", name) for name in THREE)
    rows = ["topic", "ner", "pos", "ner"]
    found = ask(model, "llama", [{"task": name} for name in rows])
    for row, name in enumerate(rows):
        assert_close(found[row], wanted[name][row], dtype="float32")
    save(model, tmp_path / "adapter")
    loaded = load(make("llama"), tmp_path / "adapter")
    assert_close(ask(loaded, "llama", [{"task": name} for name in rows]), found)


def test_into_an_adapted_model_that_lacks_their_layers(tmp_path):
    folders, wanted = three(tmp_path)
    model = adapt(make("llama"), config(target_modules=["q_proj", "gate_proj"]))
    randomize(model)
    row = {"language": "swa", "task": "pos"}
    before = ask(model, "llama", [row] * 4)
    values = {name: p.detach().clone() for name, p in live_pairs(model).items()}
    adapted = {path for path, _ in flix_layers(model)}
    import_peft(model, folders, "lora")
    registry = model.flix_config.registry
    assert registry.id("language", "swa") == 1 and registry.groups == ("language", "task", "lora")
    assert {path for path, _ in flix_layers(model)} > adapted
    assert all(torch.equal(live_pairs(model)[name], value) for name, value in values.items())
    found = ask(model, "llama", [row, {"lora": "ner"}, {"lora": "pos"}, {"lora": "topic"}])
    assert_close(found[0], before[0])
    for position, name in enumerate(THREE, start=1):
        assert_close(found[position], wanted[name][position], dtype="float32")


def test_into_a_group_that_exists(tmp_path):
    folders, wanted = three(tmp_path)
    model = import_peft(make("llama"), {"ner": folders["ner"]}, "task")
    with pytest.raises(AdapterError, match=r"task=ner .*ranks"):
        import_peft(model, {"ner": folders["topic"]}, "task")
    import_peft(model, {"pos": folders["pos"]}, "task")
    import_peft(model, {"ner": folders["topic"]}, "task", conflicts="replace")
    found = ask(model, "llama", [{"task": name} for name in ("ner", "pos", "ner", "pos")])
    for row, name in enumerate(("topic", "pos", "topic", "pos")):
        assert_close(found[row], wanted[name][row], dtype="float32")


def test_what_was_imported_trains_on_and_is_exported_anew(tmp_path):
    folders, wanted = three(tmp_path)
    model = import_peft(make("llama"), folders, "task").train()
    registry = model.flix_config.registry
    ids = torch.from_numpy(registry.encode([{"task": "ner"}] * 4).ids)
    before = {name: p.detach().clone() for name, p in live_pairs(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output(model(**batch("llama"), flix_features=ids)).square().mean().backward()
        optimizer.step()
    for name, value in live_pairs(model).items():
        assert torch.equal(value, before[name]) == (not name.endswith(".ner")), name
    trained = ask(model, "llama", [{"task": "ner"}] * 4)
    assert_far(trained, wanted["ner"], at_least=1e-2)
    export_peft(model, {"task": "ner"}, tmp_path / "again")
    assert_close(answer("llama", tmp_path / "again"), trained, dtype="float32")


def test_a_bfloat16_lora(tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    model = peft.get_peft_model(make("llama").bfloat16(), peft.LoraConfig(**settings))
    fill(model, 0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    # The base's embedding, which is rounded here, stays out of the file: PEFT would put it into the model.
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = ask(import_peft(make("llama"), {"x": tmp_path}, "task"), "llama", [{"task": "x"}] * 4)
    assert_close(found, answer("llama", tmp_path), dtype="float32")


def refused(tmp_path, message, name="bert", **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = make(name, torch.float32)
        peft.get_peft_model(base, peft.LoraConfig(r=2, **settings)).save_pretrained(tmp_path)
    model = make(name)
    with pytest.raises(AdapterError, match=message):
        import_peft(model, {"x": tmp_path}, "task")
    assert not list(flix_layers(model))


def test_dora_is_refused(tmp_path):
    refused(tmp_path, "use_dora is set", target_modules=["query"], use_dora=True)


def test_biases_are_refused(tmp_path):
    refused(tmp_path, "trained biases", target_modules=["query"], bias="lora_only")


def test_pissa_is_refused(tmp_path):
    refused(tmp_path, "began by changing", target_modules=["query"], init_lora_weights="pissa")


def test_pickles_are_refused(tmp_path):
    made = peft.get_peft_model(make("bert"), peft.LoraConfig(target_modules=["query"]))
    made.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle, which is not read"):
        import_peft(make("bert"), {"x": tmp_path}, "task")


def test_whole_modules_are_refused_or_left_out(tmp_path):
    settings = {"target_modules": ["query"], "modules_to_save": ["pooler"]}
    refused(tmp_path, "holds more than low-rank pairs: .*pooler", **settings)
    model = import_peft(make("bert"), {"x": tmp_path}, "task", skip_modules=True)
    assert {path.rsplit(".", 1)[-1] for path, _ in flix_layers(model)} == {"query"}


def test_another_architecture_is_named_by_its_first_layer(tmp_path):
    make_lora("llama", tmp_path, r=2, target_modules=["v_proj", "q_proj"])
    for target in (make("gpt2"), adapt(make("gpt2"), config())):
        with pytest.raises(AdapterError, match=r"no layer 'model\.layers\.0\.self_attn\.q_proj'"):
            import_peft(target, {"x": tmp_path}, "lora")


def test_a_model_of_another_size_is_named_by_its_first_layer(tmp_path):
    from tests.helpers.torch import llama

    make_lora("llama", tmp_path, r=2, target_modules=["up_proj"])
    with pytest.raises(AdapterError, match=r"mlp\.up_proj' is linear 16 -> 24 .* 16 -> 32"):
        import_peft(llama(intermediate_size=32), {"x": tmp_path}, "task")


def test_a_lora_of_the_model_with_its_head_fits_the_model_without(tmp_path):
    from transformers import LlamaModel

    make_lora("llama", tmp_path, r=2, target_modules=["q_proj"])
    whole = make("llama")
    body = LlamaModel(whole.config).double()
    body.load_state_dict(whole.model.state_dict())
    with pytest.raises(AdapterError, match="rename= translates"):
        import_peft(body, {"x": tmp_path}, "task")
    import_peft(body, {"x": tmp_path}, "task", rename=lambda path: path.removeprefix("model."))
    found = ask(body, "llama", [{"task": "x"}] * 4)
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(whole, tmp_path).double().eval().base_model.model
        wanted = wanted.model(**batch("llama")).last_hidden_state
    assert_close(found, wanted, dtype="float32")


def test_names_are_checked(tmp_path):
    make_lora("bert", tmp_path, r=2, target_modules=["query"])
    with pytest.raises(FeatureError, match=r"without '\."):
        import_peft(make("bert"), {"x": tmp_path}, "a.b")
    with pytest.raises(flix.ConfigError, match="feature: folder"):
        import_peft(make("bert"), tmp_path, "task")
