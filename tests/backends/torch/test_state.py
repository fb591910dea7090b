"""What a model carries goes with its copies."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import merge_in_place, remove_feature, unmerge  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    ROW,
    adapted,
    batch,
    output,
    run,
)


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
