"""What ``adapt`` leaves out is said, and what stands beside flix's layers (PEFT's, whole-model files) is refused."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402

from flix import TargetError  # noqa: E402
from flix.backends.torch import adapt, merge  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import make, randomize, routing  # noqa: E402
from tests.helpers.zoo import inputs_of  # noqa: E402

ROW = {"language": "swa", "task": "pos"}


class Own(nn.Linear):
    """Gives more than one thing, as routers do."""

    def forward(self, x):
        return super().forward(x), x


class Packed(nn.Module):
    """As quantised layers are that are no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 4, 4
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int8))


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 4))


class FlatExperts(nn.Module):
    """As DBRX's are, one below the other."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(8, 4))


def _mixed():
    bits = nn.Linear(4, 4)
    bits.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    parts = {
        "q": nn.Linear(4, 4), "a": Own(4, 4), "b": Own(4, 4), "packed": Packed(), "bits": bits, "stacked": Stacked(), "flat": FlatExperts(),
        "attention": nn.MultiheadAttention(4, 2, kdim=2), "lm_head": Own(4, 4), "emb": nn.Embedding(4, 4),
        "conv": nn.Conv1d(4, 4, 2), "table": nn.ParameterDict({"cls": nn.Parameter(torch.zeros(1, 1, 4))}),
    }  # fmt: skip
    return nn.ModuleDict(parts)


REASONS = [
    r"'a' and 1 more \(its class Own has a forward of its own, which does not give vectors of its size\)",
    r"'packed' \(its class Packed is not an nn.Linear, nor a quantised layer that flix knows\)",
    r"'bits' \(its kernel is quantised\)",
    r"'flat' \(FlatExperts stacks its kernels in one tensor, as experts do\)",
    r"'stacked' \(Stacked stacks its kernels in one tensor, as experts do\)",
    r"'attention.out_proj' \(nn.MultiheadAttention reads its kernel and skips its forward: its projections are three",
]


def test_all_linear_says_what_it_leaves_out_and_why_in_one_warning():
    with pytest.warns(UserWarning) as told:
        adapt(_mixed(), config())
    (said,) = [str(warning.message) for warning in told]
    for reason in REASONS:
        with pytest.warns(UserWarning, match=reason):
            adapt(_mixed(), config())
    for silent in ("lm_head", "emb", "conv", "table", "'q'"):
        assert silent not in said
    assert "\n" not in said


def test_what_was_excluded_or_never_meant_is_not_spoken_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(
            _mixed(),
            config(exclude_modules=["a", "b", "packed", "bits", "stacked", "flat", "out_proj"]),
        )
        adapt(_mixed(), config(target_modules=["q"]))
        adapt(make("llama"), config())


# PEFT


def _lora():
    peft = pytest.importorskip("peft")
    return peft, peft.LoraConfig(r=2, target_modules=["q_proj"])


def test_a_model_with_pefts_layers_is_refused():
    peft, lora = _lora()
    wrapped = peft.get_peft_model(make("llama"), lora)
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(TargetError, match=r"q_proj' is one of PEFT's layers.*import_peft"):
            adapt(model, config())
    plain = wrapped.merge_and_unload()
    adapt(plain, config())


@pytest.mark.parametrize("way", ["get_peft_model", "inject"])
def test_peft_over_an_adapted_model_is_refused(way):
    peft, lora = _lora()
    model = adapt(make("llama"), config())
    with pytest.raises(TargetError, match=r"PEFT's layers would wrap adapted ones"):
        peft.get_peft_model(
            model, lora
        ) if way == "get_peft_model" else peft.inject_adapter_in_model(lora, model)
    assert not hasattr(model, "peft_config")
    peft.get_peft_model(merge(adapt(make("llama"), config()), ROW), lora)  # the way out


# Files of whole models


def test_whole_model_files_of_an_adapted_model_are_refused(tmp_path):
    model = adapt(make("llama"), config())
    for module in (model, model.model):
        for name in ("save_pretrained", "push_to_hub"):
            with pytest.raises(TargetError, match=r"save\(model, folder\).*merge\(model, row\)"):
                getattr(module, name)(str(tmp_path / "whole"))
    assert not (tmp_path / "whole").exists()
    randomize(model)
    plain = merge(model, ROW)
    plain.save_pretrained(tmp_path / "plain")
    inputs, (ids, weights) = inputs_of("llama", rows=2), routing([ROW] * 2)
    again = type(plain).from_pretrained(tmp_path / "plain", dtype=torch.float64)
    found = model.eval()(**inputs, flix_features=ids, flix_weights=weights).logits
    assert_close(again(**inputs).logits, found)
