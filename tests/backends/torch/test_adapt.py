"""Plain models become adapted ones: which layers, what stays as it was, and what is refused."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import ConfigError, TargetError  # noqa: E402
from flix.backends.torch import adapt, load, merge, save, summary, trainable_parameters  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    MODELS,
    ROW,
    adapted,
    batch,
    make,
    output,
    routing,
)


def test_all_linear_leaves_heads_out_and_freezes_the_base():
    model = adapted()
    paths = [path for path, _ in flix_layers(model)]
    assert len(paths) == 14 and "lm_head" not in paths
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "flix_" in n
    }
    assert sum(p.numel() for p in trainable_parameters(model)) == summary(model).trainable
    assert "14 adapted layers" in str(summary(model))


@pytest.mark.parametrize(
    "targets,message",
    [
        (["q_porj"], r"'q_porj' matches no layer \(did you mean 'q_proj'"),
        (r".*\.attn\..*", r"matches no layer"),
        (["input_layernorm"], r"'model.layers.0.input_layernorm', which cannot be adapted"),
    ],
)
def test_patterns_that_cannot_be_met_are_refused(targets, message):
    model = make("llama")
    with pytest.raises(TargetError, match=message):
        adapt(model, config(target_modules=targets))
    assert not list(flix_layers(model))


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_adapting_a_thousand_layers_is_quick_and_so_are_its_files(count, tmp_path):
    """On a quiet machine 100 features take under 2 s to adapt and under 10 s to save and load; here, with room."""
    import time

    registry = flix.FeatureRegistry({"language": [f"l{i}" for i in range(count)]})
    many = flix.FlixConfig(registry=registry, ranks=1, rank_pattern={"9": 2})
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(1000)))
    share = count / 100
    start = time.process_time()
    adapt(model, many)
    assert time.process_time() - start < 1.0 + 5.0 * share
    start = time.process_time()
    save(model, tmp_path)
    load(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(1000))), tmp_path)
    assert time.process_time() - start < 2.0 + 20.0 * share


def test_adapting_twice_is_refused():
    with pytest.raises(TargetError, match="adapted already"):
        adapt(adapted(), config())


def test_multihead_attention_is_not_silently_skipped():
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    adapt(model, config())
    attention = {"self_attn.in_proj_weight", "self_attn.out_proj"}
    assert {path for path, _ in flix_layers(model)} == {"linear1", "linear2", *attention}


def test_unadapted_models_are_refused():
    for call in (summary, trainable_parameters, lambda m: save(m, "x"), lambda m: merge(m, ROW)):
        with pytest.raises(TargetError, match="needs an adapted model"):
            call(make("llama"))


@pytest.mark.parametrize("name", MODELS)
def test_adapted_model_starts_equal_to_its_base(name):
    base = make(name)
    adapted = adapt(copy.deepcopy(base), config())
    ids, weights = routing()
    inputs = batch(name)
    found = output(adapted(**inputs, flix_features=ids, flix_weights=weights))
    assert_close(found, output(base(**inputs)))


@pytest.mark.parametrize("kind", [torch.nn.Sequential, torch.nn.ModuleList])
def test_the_steps_of_a_list_are_its_own(kind):
    made = [torch.nn.Linear(8, 8) for _ in range(3)]
    steps = [*made]
    model = adapt(kind(*[made] if kind is torch.nn.ModuleList else made), config())
    assert len(model) == 3 and list(model) == steps and model[-1] is steps[-1]


def test_what_users_of_peft_type(capsys):
    model = adapt(make("llama"), config())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.strip() == str(summary(model)).splitlines()[0]
    with pytest.raises(ConfigError, match="needs a FlixConfig, got dict; FlixConfig"):
        adapt(make("llama"), {"r": 8})
