"""The errors of docs/faq.md say what that page says they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flix
from flix.backends import torch as backend
from flix.transformers import FlixCollator
from tests.site.public import ROOT

PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
ERRORS = PAGE.split("## Questions without an error")[0]
MESSAGES = re.findall(r"^### (.+)$", ERRORS, re.MULTILINE)

REGISTRY = flix.FeatureRegistry({"language": ["swa", "yor"], "task": ["ner"]})
CONFIG = flix.FlixConfig(registry=REGISTRY, ranks=2)
ROWS = [{"language": "swa", "task": "ner"}, {"language": "yor", "task": "ner"}]
TOKENS = torch.tensor([[1, 2], [3, 4]])


def base(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))


def adapted(**how):
    return backend.adapt(base(), CONFIG, **how)


class Reads(torch.nn.Module):
    """A model that reads a layer's weight."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.outer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.outer(x) @ self.inner.weight


def bypassing():
    model = backend.adapt(Reads(), CONFIG)
    model(torch.ones(2, 4), flix_features=REGISTRY.encode(ROWS))


def saved(folder):
    backend.save(adapted(), folder)
    return folder


def other_base(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.load(base(seed=1), saved(folder))


def elsewhere(code, **environment):
    """What a fresh interpreter says before it ends."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    raise flix.FlixError(done.stderr.splitlines()[-1])


def without_torch(_):
    elsewhere("import sys; sys.modules['torch'] = None; import flix.backends.torch")


def keras_on_torch(_):
    pytest.importorskip("keras")
    elsewhere("import flix.backends.tensorflow", KERAS_BACKEND="torch")


def not_on_the_hub(_):
    pytest.importorskip("huggingface_hub")
    code = "from flix.hub import fetch; fetch('org/name')"
    elsewhere(code, HF_HUB_OFFLINE="1", HF_HOME="/nonexistent")


PROPORTIONAL = {"sizes": {"language": {"swa": 1, "yor": 5}, "task": {"ner": 9}}, "budget": 1}
T5 = flix.FlixConfig(registry=REGISTRY, ranks=2, target_modules=["q_proj"])
RAISES = {
    "an adapted model was": lambda _: adapted()(TOKENS),
    "layer ... is adapted": lambda _: adapted().model.layers[0].mlp(torch.zeros(1, 16)),
    "row 0: group": lambda _: REGISTRY.encode([{"language": "swq"}]),
    "row 0: no feature group": lambda _: REGISTRY.encode([{"lang": "swa"}]),
    "flix_features routes": lambda _: adapted()(TOKENS, flix_features=REGISTRY.encode(ROWS[:1])),
    "flix_features must hold": lambda _: adapted()(TOKENS, flix_features=ROWS),
    "flix_features has": lambda _: adapted()(TOKENS, flix_features=torch.tensor([[9], [1]])),
    "flix_weights": lambda _: adapted()(TOKENS, flix_weights=torch.ones(2, 1)),
    "flix_features was": lambda _: backend.merge(adapted(), ROWS[0])(
        TOKENS, flix_features=REGISTRY.encode(ROWS)
    ),
    "strategy 'single'": lambda _: adapted(strategy="single")(
        TOKENS, flix_features=REGISTRY.encode(ROWS)
    ),
    "target_modules": lambda _: backend.adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), T5),
    "... adapted, but": lambda _: bypassing(),
    "the model is adapted": lambda _: backend.adapt(adapted(), CONFIG),
    "save needs": lambda folder: backend.save(base(), folder),
    "adapt needs": lambda _: backend.adapt(base(), peft.LoraConfig()),
    "by_group ranks": lambda _: flix.FlixConfig(
        registry=REGISTRY, ranks=flix.ranks.by_group(language=4)
    ),
    "a budget": lambda _: flix.FlixConfig(
        registry=REGISTRY, ranks=flix.ranks.proportional(**PROPORTIONAL)
    ),
    "PEFT's layers": lambda _: peft.get_peft_model(
        adapted(), peft.LoraConfig(target_modules=["q_proj"])
    ),
    "... is not an adapter": lambda folder: backend.load(base(), folder / "nothing"),
    "the adapter was made": lambda folder: backend.load(Reads(), saved(folder)),
    "the adapter was trained": other_base,
    "... is no PEFT": lambda folder: backend.import_peft(
        base(), {"x": saved(folder)}, group="task"
    ),
    "the adapter ... cannot": not_on_the_hub,
    "row 0 has none": lambda _: FlixCollator(CONFIG, list)([{"input_ids": [1]}]),
    "row 0 has no feature": lambda _: FlixCollator(CONFIG, list)([{"language": "swa"}]),
    "no backend": lambda _: flix.backends.get("pytorch"),
    "the torch backend": without_torch,
    "the tensorflow backend": keras_on_torch,
}


def raised_by(message: str):
    (found,) = [does for start, does in RAISES.items() if message.startswith(start)]
    return found


@pytest.mark.parametrize("message", MESSAGES)
def test_an_error_of_the_page_is_raised_in_these_words(message, tmp_path: Path):
    words = ".*".join(map(re.escape, message.split("...")))
    with pytest.raises((flix.FlixError, UserWarning), match=words):
        raised_by(message)(tmp_path)


def test_every_case_is_on_the_page():
    assert len(MESSAGES) == len(set(MESSAGES)) == len(RAISES)


@pytest.mark.parametrize("part", re.split(r"^### ", ERRORS, flags=re.MULTILINE)[1:])
def test_each_error_says_why_and_what_to_do(part):
    assert "\n**Why.** " in part and "\n**What to do.** " in part
