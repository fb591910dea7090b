"""The planner: pure, explainable, fitted to measurements."""

from __future__ import annotations

import json

import numpy as np
import pytest

import flix
from flix.core.adapter.adapter import LayerShape
from flix.core.costs import Layers
from flix.core.errors import ConfigError
from flix.core.strategy import decide as planner
from flix.core.strategy.calibrate import calibrate, grid
from flix.core.strategy.decide import PLANNED, TERMS, Calibration, Decision, Facts, decide, fit
from flix.core.strategy.explain import Batch, explain

DEVICES = ("torch-cpu", "jax-cpu", "tensorflow-cpu")
TRUE = Calibration(
    "made-up",
    {
        "gather": (4e-4, 1e-6, 3e-9, 1.2e-10),
        "masked": (3e-4, 2e-6, 5e-9, 1.0e-10),
        "single": (3e-4, 0.0, 5e-9, 1.5e-10),
    },
)


def facts(examples=16, tokens=64, rows=16, union=144, d=768, device="torch-cpu", fused=False):
    return Facts(examples, tokens, rows, union, d, d, device, fused)


@pytest.mark.parametrize("device", DEVICES)
def test_own_table_chooses_what_the_measurements_say(device):
    # Long rows over a wide union: the masked product computes many times as much.
    assert decide("auto", facts(device=device)).strategy == "gather"
    # Single positions: gathering copies whole rows of A and B for each of them.
    assert decide("auto", facts(64, 1, 16, 24, device=device)).strategy == "masked"
    assert decide("auto", facts(1, 64, 16, 16, device=device)).strategy == "single"


def test_what_is_asked_for_is_done_and_said():
    for strategy in ("gather", "masked", "single", "fused"):
        assert decide(strategy, facts()) == Decision(strategy, "it was asked for")
    with pytest.raises(ConfigError, match=r"strategy must be one of auto, gather, .* 'fast'"):
        decide("fast", facts())


def test_fused_kernels_come_first():
    assert decide("auto", facts(device="torch-cuda", fused=True)).strategy == "fused"
    assert decide("auto", facts(64, 1, 16, 64, device="torch-cuda", fused=True)).strategy == "fused"
    many = decide("auto", facts(256, 1, 16, 64, device="torch-cuda", fused=True))
    assert many.strategy == "masked" and "256 examples of one position" in many.reason


def test_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no calibration for 'abacus'.*torch-cpu"):
        decide("auto", facts(device="abacus"))


def test_device_without_measurements_goes_by_the_cpu_and_says_so():
    decision = decide("auto", facts(device="jax-gpu"))
    assert decision.strategy == "gather"
    assert decision.reason.endswith("(by jax-cpu: jax-gpu is not measured)")


def test_reason_names_the_figures():
    decision = decide("auto", facts(), {"torch-cpu": TRUE})
    assert decision.strategy == "gather"
    assert "masked is estimated to add" in decision.reason
    assert "16 examples use 16 rank rows each, 144 together, over 64 positions" in decision.reason
    assert decision.seconds["gather"] < decision.seconds["masked"]


def test_estimates_are_the_formula():
    one = facts(4, 3, 5, 7, d=10)
    moved, product = (4 * 5 + 7) * 20, 4 * 3 * 5 * 20
    assert TRUE.estimate(one, "gather") == pytest.approx(
        4e-4 + 4 * 1e-6 + moved * 3e-9 + product * 1.2e-10
    )
    assert TRUE.estimate(one, "masked") == pytest.approx(
        3e-4 + 4 * 2e-6 + 7 * 20 * 5e-9 + 4 * 3 * 7 * 20 * 1.0e-10
    )


def test_a_union_that_is_stacked_already_moves_nothing():
    fresh, kept = facts(16, 1), Facts(16, 1, 16, 144, 768, 768, "torch-cpu", stacked=True)
    moved = TRUE.estimate(fresh, "masked") - TRUE.estimate(kept, "masked")
    assert moved == pytest.approx(144 * 1536 * 5e-9)
    assert TRUE.estimate(fresh, "gather") == TRUE.estimate(kept, "gather")


def test_fit_finds_the_coefficients_that_made_the_times():
    shapes = [shape for shape, _, _ in grid("made-up")]
    samples = [(f, s, TRUE.estimate(f, s)) for f in shapes for s in PLANNED]
    found = fit("made-up", samples)
    for strategy in PLANNED:
        np.testing.assert_allclose(found.seconds[strategy], TRUE.seconds[strategy], atol=1e-15)


def test_fit_has_no_negative_coefficient():
    rng = np.random.default_rng(0)
    shapes = [shape for shape, _, _ in grid("made-up")]
    samples = [
        (f, s, TRUE.estimate(f, s) * float(rng.uniform(0.3, 3))) for f in shapes for s in PLANNED
    ]
    found = fit("made-up", samples)
    assert all(c >= 0 for s in PLANNED for c in found.seconds[s])
    with pytest.raises(ConfigError, match="4 measurements of 'gather'"):
        fit("made-up", samples[:3])


def test_calibrate_measures_what_a_backend_lends(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flix.core.strategy.calibrate.time.perf_counter", lambda: now[0])

    def make(config, facts, ids, strategy):
        assert ids.shape == (facts.examples, 2)
        seconds = 5e-3 if strategy is None else 5e-3 + TRUE.estimate(facts, strategy)
        return lambda: now.__setitem__(0, now[0] + seconds)

    seen = []
    found = calibrate("made-up", make, measured="now", progress=lambda *a: seen.append(a))
    assert found.device == "made-up" and found.measured == "now"
    assert seen[-1] == (48, 48)
    for strategy in PLANNED:
        np.testing.assert_allclose(found.seconds[strategy], TRUE.seconds[strategy], atol=1e-13)


def test_user_table_takes_the_place_of_ours(tmp_path, monkeypatch):
    path = tmp_path / "calibration.json"
    costs = {s: dict.fromkeys(TERMS, 0.0) for s in PLANNED}
    costs["gather"]["start"] = 1.0
    path.write_text(json.dumps({"torch-cpu": {"measured": "here", "seconds": costs}}))
    monkeypatch.setenv("FLIX_CALIBRATION", str(path))
    planner.calibrations.cache_clear()
    try:
        assert decide("auto", facts()).strategy == "masked"
        assert planner.calibrations()["jax-cpu"].measured != "here"
        path.write_text('{"torch-cpu": {"seconds": {"gather": {"start": -1}}}}')
        planner.calibrations.cache_clear()
        with pytest.raises(ConfigError, match=r"calibration\.json is no table of calibrations"):
            decide("auto", facts())
    finally:
        planner.calibrations.cache_clear()


def test_explain_groups_layers_that_are_alike():
    registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos", "mt"]})
    config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=4, task=8))
    layers: Layers = {
        "q": LayerShape(64, 64, "linear"),
        "v": LayerShape(64, 64, "linear"),
        "up": LayerShape(64, 256, "linear"),
        "embed": LayerShape(1000, 64, "embedding"),
    }
    choices = explain(config, layers, None, Batch(16, 64, "torch-cpu"))
    assert [choice.layers for choice in choices] == [("q", "v"), ("up",)]
    assert {(c.facts.rows, c.facts.union) for c in choices} == {(12, 32)}
    assert json.loads(json.dumps(choices[0].to_dict()))["strategy"] in PLANNED
    # Fewer examples than compositions: the union is bounded by what they use.
    assert explain(config, layers, None, Batch(1, 64, "torch-cpu"))[0].facts.union == 12
