"""What a model carries goes with its copies."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import adapt, merge_in_place, remove_feature, unmerge  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import batch, make, output, randomize  # noqa: E402
from tests.helpers.zoo import inputs_of  # noqa: E402

ROW = {"language": "swa", "task": "pos"}


def adapted(name="llama", seed=0, **changes):
    model = adapt(make(name), config(**changes))
    randomize(model, seed)
    return model.eval()


def run(model, name="llama", rows=None):
    rows = rows or [ROW, {"language": "hau", "task": "ner"}, {"task": "pos"}]
    encoded = model.flix_config.registry.encode(rows)
    with torch.no_grad():
        return output(model(**inputs_of(name, rows=len(rows)), flix_features=encoded))


def test_copies_carry_the_state_of_their_model():
    model = adapted()
    remove_feature(model, "language", "hau")
    merge_in_place(model, ROW)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wanted = output(model(**batch("llama")))
        assert_close(output(twin(**batch("llama"))), wanted)
    unmerge(model)
    unmerge(twin)
    assert_close(run(twin, rows=[ROW]), run(model, rows=[ROW]))
