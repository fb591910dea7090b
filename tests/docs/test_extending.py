"""The examples of docs/extending.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def test_examples_run():
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert examples
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})
