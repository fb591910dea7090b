"""flix's own backends: a dash in their columns would be a check that was lost."""

from __future__ import annotations

import pytest
from flix_conformance import runner
from flix_conformance.checks import CHECKS
from flix_conformance.checks._registry import offered

# PEFT names layers as torch does; folding, experts and the search are torch's; JAX's heads do not train with features.
_TORCH = ("exported", "merged_in_place", "experts", "experts_gradients", "experts_live", "searched")
ABSENT = {"jax": ("trained_heads", *_TORCH), "tensorflow": _TORCH}


@pytest.mark.parametrize("name", ["torch", "jax", "tensorflow"])
def test_they_offer_all_that_the_kit_asks_for(name: str) -> None:
    try:
        backend = runner.load(name)
    except runner.NotInstalledError as error:
        pytest.skip(str(error))
    for check in CHECKS.values():
        if check.name not in ABSENT.get(name, ()):
            offered(check, backend)
    assert {*backend.dtypes} == {"float32", "bfloat16", "float64"}
    assert {*backend.strategies} >= {"auto", "gather", "masked", "single"}
    assert {*backend.id_dtypes} >= {"int32", "int64", "uint8"}
