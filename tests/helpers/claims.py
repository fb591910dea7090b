"""What a test says that it covers: (architecture, feature) pairs, cells of the table in docs/support.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

MARKER = "covers(architecture, feature, backend='torch'): the test covers this cell of the table in docs/support.md"


def covers(architecture: str, *features: str, backend: str = "torch") -> list[pytest.MarkDecorator]:
    """One mark for each feature."""
    return [pytest.mark.covers(architecture, feature, backend=backend) for feature in features]


def over(
    architectures: Iterable[str],
    *features: str,
    slow: Iterable[str] = (),
    backend: str = "torch",
    argument: str = "name",
) -> Any:
    """Run a test over architectures, claiming the features for each of them.

    Args:
        architectures: names, which the test gets.
        features: columns of the table.
        slow: the architectures with which the test is slow.
        backend: the table's section.
        argument: what the test calls the name.
    """
    late = set(slow)
    return pytest.mark.parametrize(
        argument,
        [
            pytest.param(
                name,
                marks=[
                    *covers(name, *features, backend=backend),
                    *([pytest.mark.slow] if name in late else []),
                ],
            )
            for name in architectures
        ],
    )
