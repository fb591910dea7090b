"""The hooks around optimizers' steps, and what they are for: absent features stay where they are."""

from __future__ import annotations

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import adapt, trainable_parameters  # noqa: E402
from flix.backends.torch.patches import optimizers  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.torch import batch, live_pairs, make, output, randomize, routing  # noqa: E402

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.5),
}


def model(head=True):
    made = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)), config(target_modules=["0"]))  # fmt: skip
    made[1].requires_grad_(head)
    return made


def test_the_hooks_can_be_taken_out_and_put_back():
    made = model()
    optimizer = torch.optim.SGD(trainable_parameters(made), 0.1)
    count = optimizers.steps
    optimizer.step()
    assert optimizers.steps == count + 1
    optimizers.uninstall()
    try:
        optimizer.step()
        assert optimizers.steps == count + 1
    finally:
        model()  # an adapted model installs them again
    optimizer.step()
    assert optimizers.steps == count + 2


def test_the_hooks_keep_no_model_alive():
    made = model()
    gone = weakref.ref(made.flix_state)
    del made
    gc.collect()
    assert gone() is None


def _step(model, optimizer, rows, inputs) -> None:
    ids, weights = routing(rows)
    optimizer.zero_grad()
    output(model(**inputs, flix_features=ids, flix_weights=weights)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_absent_features_are_bit_identical_under_any_optimizer(optimizer):
    model = adapt(make("llama", torch.float32), config())
    randomize(model)
    opt = OPTIMIZERS[optimizer](trainable_parameters(model))
    inputs = batch("llama", rows=2)
    # swa and pos get momentum first, and are then absent.
    _step(model, opt, [{"language": "swa", "task": "pos"}] * 2, inputs)
    before = {name: p.detach().clone() for name, p in live_pairs(model).items()}
    for _ in range(3):
        _step(model, opt, [{"language": "hau", "task": "ner"}, {"language": "hau"}], inputs)
    moved = {n for n, p in live_pairs(model).items() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.endswith((".language.hau", ".task.ner"))}


def test_the_base_never_moves():
    model = adapt(make("gpt2", torch.float32), config())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        _step(model, opt, ROWS, batch("gpt2"))
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
