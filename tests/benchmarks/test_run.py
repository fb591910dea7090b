"""Parts by name."""

import pytest

from benchmarks import report
from benchmarks.run import SUITES, chosen


def test_parts_are_chosen_by_name():
    assert chosen("") == list(report.PARTS) == list(SUITES)
    assert chosen("layer") == ["layer-torch", "layer-jax", "layer-tensorflow"]
    assert chosen("tenants") == ["tenants-t5", "tenants-gpt2"]
    scale = ["scale-layer", "scale-features", "scale-paging"]
    assert chosen("scale,model-t5") == ["model-t5", *scale]
    with pytest.raises(SystemExit, match="no part"):
        chosen("sale")
