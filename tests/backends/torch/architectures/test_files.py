"""The ways out of a model: adapter files, merged plain models and their folders, PEFT."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix import AdapterError  # noqa: E402
from flix.backends.torch import adapt, export_peft, load, merge, save  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import live_pairs, output, randomize, routing  # noqa: E402
from tests.helpers.zoo import (  # noqa: E402
    RELATIVES,
    ZOO,
    class_of,
    inputs_of,
    pretrained,
    slowly,
    weights_of,
)

ROW = {"language": "swa", "task": "pos"}


def _adapted(name, **changes):
    weights_of(name)
    model = adapt(pretrained(name), config(**changes))
    randomize(model)
    return model.eval()


def _routed(model, name, row=ROW):
    ids, weights = routing([row] * 2)
    inputs = inputs_of(name, rows=2)
    with torch.no_grad():
        return output(model(**inputs, flix_features=ids, flix_weights=weights))


def _plain(model, name):
    with torch.no_grad():
        return output(model(**inputs_of(name, rows=2)))


@over(ZOO, "save and load", slow=["minilm"])
def test_an_adapter_loads_into_a_fresh_model(name, tmp_path):
    adapted = _adapted(name, rank_pattern={".*(q|q_proj|query|c_attn)": 5})
    save(adapted, tmp_path / "adapter")
    fresh = load(pretrained(name), tmp_path / "adapter").eval()
    assert fresh.flix_config == adapted.flix_config
    ours, theirs = live_pairs(fresh), live_pairs(adapted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[pair], value) for pair, value in theirs.items())
    assert_close(_routed(fresh, name), _routed(adapted, name))
    assert_far(_routed(fresh, name), _plain(pretrained(name), name))


def _held_to_its_folder(adapted, merged, name, tmp_path):
    """The merged model equals the routed one, and so does the folder that it saves."""
    expected = _routed(adapted, name)
    assert type(merged) is class_of(name)
    assert not list(flix_layers(merged))
    assert_close(_plain(merged, name), expected)
    merged.save_pretrained(tmp_path)
    again = slowly(class_of(name).from_pretrained(tmp_path, dtype=torch.float64), name)
    assert_close(_plain(again, name), expected)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "flix" in key]  # noqa: SIM118
    assert "flix" not in (tmp_path / "config.json").read_text()


@over(ZOO, "merge")
def test_a_merged_model_is_a_plain_model_and_saves_as_one(name, tmp_path):
    adapted = _adapted(name)
    for row in (ROWS[1], ROW):
        merged = merge(adapted, row)
        with torch.no_grad():
            assert_close(_plain(merged, name), _routed(adapted, name, row))
    _held_to_its_folder(adapted, merged, name, tmp_path)


@over(ZOO, "merge", slow=["minilm"])
def test_merging_an_embedding_leaves_a_tied_head_alone(name, tmp_path):
    adapted = _adapted(name, target_modules=list(ZOO[name].embeddings))
    assert_far(_routed(adapted, name), _plain(pretrained(name), name))
    merged = merge(adapted, ROW)
    _held_to_its_folder(adapted, merged, name, tmp_path)
    if ZOO[name].kind == "decoder":
        assert not merged.config.tie_word_embeddings


@over(ZOO, "PEFT", slow=["minilm"])
def test_an_exported_composition_opens_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    excluded = ()
    if (
        name == "deepseek-v3"
    ):  # what its dense layer and its shared experts call theirs, PEFT takes for the experts'
        excluded = r".*(layers\.0\.mlp|shared_experts)\..*"
        with pytest.raises(AdapterError, match=r"'down_proj', 'gate_proj', 'up_proj'"):
            export_peft(_adapted(name), ROW, tmp_path)
    pattern = {".*(q|q_proj|q_a_proj|query|c_attn)": {"task": 1}}
    model = _adapted(name, rank_pattern=pattern, exclude_modules=excluded)
    report = export_peft(model, ROW, tmp_path)
    assert report.rank == 7 and report.max_lora_rank == 8
    served = peft.PeftModel.from_pretrained(pretrained(name), tmp_path).double().eval()
    found = _plain(served, name)
    assert_close(found, _routed(model, name), dtype="float32")
    assert_far(found, _plain(pretrained(name), name))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] and not written["use_rslora"]


# PEFT adapts the module by name; those models run other modules that share its kernel.
@over([n for n, a in ZOO.items() if a.kind != "encoder-decoder"], "PEFT", slow=RELATIVES)
def test_an_exported_embedding_opens_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = _adapted(name, target_modules=list(ZOO[name].embeddings))
    export_peft(model, ROW, tmp_path)
    served = peft.PeftModel.from_pretrained(pretrained(name), tmp_path).double().eval()
    assert_close(_plain(served, name), _routed(model, name), dtype="float32")


@over(ZOO, "mixed batch", slow=RELATIVES)
def test_class_copy_and_pickle_keep_the_model(name):
    adapted = _adapted(name)
    assert isinstance(adapted, class_of(name))
    before = _routed(adapted, name)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert isinstance(twin, class_of(name))
        assert_close(_routed(twin, name), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert_far(_routed(twin, name), before)
    assert_close(_routed(adapted, name), before)
    assert type(adapted).__name__ in repr(adapted)
