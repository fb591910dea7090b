"""Names, map and command line of LoRAs that are served side by side."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from flix import ConfigError, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import Adapter, LayerShape, expected_tensors
from flix.core.adapter.composition import composition
from flix.core.peft.exporting import as_peft, write_peft
from flix.core.peft.serving import MAP_FILE, PeftExports, Served, folder_name, lora_names

REGISTRY = FeatureRegistry({"language": ["hau", "swa", "A/B", "a_b"], "task": ["ner", "pos"]})
CONFIG = FlixConfig(registry=REGISTRY, ranks=2)


def names(*rows):
    return lora_names([composition(CONFIG, row) for row in rows], rows)


def test_names_follow_the_features():
    assert names({"language": "hau", "task": "ner"}, {"task": "pos"}) == ["hau-ner", "pos"]
    assert names({"language": {"hau": 0.5, "swa": 1.0}, "task": None}) == ["hau0.5+swa"]
    assert names({"language": ["swa", "hau"], "task": "ner"}) == ["swa+hau-ner"]


def test_names_differ_where_folders_would_not():
    first, second = names({"language": "A/B"}, {"language": "a_b"})
    assert first.startswith("A_B-") and second.startswith("a_b-") and first[4:] != second[4:]
    assert names({"language": "A/B"}) == ["A_B"]
    for name in (first, second):
        assert folder_name(name) == name


def test_one_composition_is_exported_once():
    with pytest.raises(ConfigError, match=r"are one composition"):
        names({"language": "hau", "task": "ner"}, {"task": "ner", "language": "hau"})


@pytest.mark.parametrize("name", ["", "..", ".x", "-x", "a/b", "a b", "a\\b", "a\n", 3])
def test_names_that_are_no_folders(name):
    with pytest.raises(ConfigError, match="a LoRA's name consists of"):
        folder_name(name)


def _served(tmp_path, rows, architecture="LlamaForCausalLM", **changes):
    config = FlixConfig(registry=REGISTRY, ranks={"language": 2, "task": 9}, **changes)
    layers = {"model.layers.0.self_attn.q_proj": LayerShape(4, 4)}
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.normal(size=shape).astype("f4")
        for name, shape in dict(expected_tensors(config, layers)).items()
    }
    adapter = Adapter(config, layers, tensors)
    found = []
    for name, row in rows.items():
        active = composition(config, row)
        made = write_peft(tmp_path / name, *as_peft(adapter, active), architecture=architecture)
        found.append(Served(name, active, made))
    return PeftExports(str(tmp_path), tuple(found), "my base")


def test_one_command_serves_all(tmp_path):
    rows = {"hau": {"language": "hau"}, "swa-ner": {"language": "swa", "task": "ner"}}
    made = _served(tmp_path, rows)
    assert made.command == (
        "vllm serve 'my base' --enable-lora --max-lora-rank 16 --max-loras 2 --max-cpu-loras 2 "
        f"--lora-modules hau={tmp_path}/hau swa-ner={tmp_path}/swa-ner"
    )
    assert made.message.startswith("to serve 2 LoRAs with vLLM: vllm serve")
    made.write_map()
    found = json.loads((tmp_path / MAP_FILE).read_text())
    assert found["command"] == made.command
    assert found["loras"][1] == {
        "name": "swa-ner",
        "features": {"language=swa": 1.0, "task=ner": 1.0},
        "folder": "swa-ner",
        "rank": 11,
        "error": 0.0,
        "served": True,
    }


def test_what_vllm_would_not_serve_is_named_once(tmp_path):
    rows = {name: {"language": name} for name in ("hau", "swa")}
    made = _served(tmp_path, rows, architecture="GPT2LMHeadModel")
    assert made.command == "" and made.flags == ""
    assert made.message.count("vLLM would not serve hau, swa") == 1


def test_what_was_cut_is_said_with_the_worst(tmp_path):
    made = _served(tmp_path, {name: {"language": name, "task": "ner"} for name in ("hau", "swa")})
    for cut, said in (
        (
            {"hau": 0.25, "swa": 0.0},
            "1 were cut; the largest relative error of an update is 2.50e-01, of hau",
        ),
        (
            {"hau": 0.125, "swa": 0.5},
            "2 were cut; the largest relative error of an update is 5.00e-01, of swa",
        ),
    ):
        loras = tuple(
            replace(lora, export=replace(lora.export, error=cut[lora.name])) for lora in made.loras
        )
        found = replace(made, loras=loras)
        assert found.message.splitlines()[1:] == [said]
        assert [lora["error"] for lora in found.to_dict()["loras"]] == [*cut.values()]


def test_notes_are_said_once_at_the_end(tmp_path):
    made = _served(tmp_path, {n: {"language": n} for n in ("hau", "swa")}, architecture="MyModel")
    notes = [line for line in made.message.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "whether vLLM takes LoRAs for MyModel is not known here" in notes[0]


def test_a_name_that_nothing_is_left_of_is_a_digest():
    registry = FeatureRegistry({"g": ["...", "---"]})
    rows = [{"g": "..."}, {"g": "---"}]
    config = FlixConfig(registry=registry, ranks=1)
    found = lora_names([composition(config, row) for row in rows], rows)
    assert len(set(found)) == 2 and all(folder_name(name) == name for name in found)
