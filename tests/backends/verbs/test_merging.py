"""One composition as plain kernels, in place, or as a LoRA."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("flix_numpy")

import flix_numpy

import flix
from flix import FeatureError, TargetError
from tests.helpers.example import ROW, adapted, folding, plain, same, tokens, values, verbs
from tests.helpers.registry import ROWS
from tests.helpers.tolerance import assert_close


def test_merging_gives_a_plain_copy_with_the_answers_of_the_composition():
    model = adapted(target_modules=["embed", "q", "k"])
    before = values(model)
    for row in ROWS[:3]:
        merged = verbs.merge(model, row)
        assert flix_numpy.primitives.adapted(merged) is None and merged is not model
        routing = model.state.config.registry.encode([row] * 5)
        routed = model(tokens(), routing.ids, routing.weights)
        assert_close(merged(tokens()), routed)
        with pytest.raises(flix.RoutingError, match="merged model"):
            merged(tokens(), routing.ids)
    same(values(model), before)
    assert np.array_equal(model["q"].kernel, plain()["q"].kernel)
    with pytest.raises(flix.RoutingError, match="activates none"):
        verbs.merge(model, {})
    with pytest.raises(FeatureError, match="did you mean 'swa'"):
        verbs.merge(model, {"language": "sva"})


def test_optional_verbs_say_what_the_backend_lacks():
    for call, lacked in (
        (
            lambda m: verbs.merge_in_place(m, ROW),
            "merge_in_place: its primitives lack fold, folded",
        ),
        (verbs.unmerge, "unmerge: its primitives lack fold"),
        (lambda m: verbs.export_peft(m, ROW, "x"), "export_peft: its primitives lack peft_facts"),
    ):
        with pytest.raises(TargetError, match=f"does not offer {lacked}"):
            call(adapted())


def test_a_composition_is_folded_in_and_taken_out_again():
    model = adapted()
    before = {path: layer.kernel.copy() for path, layer in model.items()}
    with pytest.raises(TargetError, match="not merged; merge_in_place"):
        folding.unmerge(model)
    assert folding.merge_in_place(model, ROW) is model
    merged = folding.merge(adapted(), ROW)
    assert all(np.array_equal(model[p].kernel, merged[p].kernel) for p in before)
    with pytest.raises(TargetError, match=r"merged already, with \{'language': 'swa'"):
        folding.merge_in_place(model, {"task": "ner"})
    assert folding.unmerge(model) is model
    assert all(np.array_equal(model[path].kernel, kernel) for path, kernel in before.items())
    with pytest.raises(TargetError, match="unmerge needs an adapted model"):
        folding.unmerge(plain())


def test_a_composition_becomes_a_lora_of_peft(tmp_path):
    model = adapted()
    export = folding.export_peft(model, ROW, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["r"] == export.rank == 7 and export.error == 0.0
    again = verbs.import_peft(plain(), {"both": tmp_path / "lora"}, "lora")
    for path, merged in verbs.merge(model, ROW).items():
        found = verbs.merge(again, {"lora": "both"})[path].kernel
        assert_close(found, merged.kernel)
    cut = folding.export_peft(model, ROW, tmp_path / "cut", compress_to=2)
    assert cut.rank == 2 and 0.0 < cut.error < 1.0
