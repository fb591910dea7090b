"""Two processes that reduce the features in use: one run of them checks everything, and each test is one check."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

from tests.backends.torch.distributed import reducing_worker  # noqa: E402
from tests.helpers.processes import run_together  # noqa: E402

MODULE = "tests.backends.torch.distributed.reducing_worker"


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return run_together(2, MODULE, timeout=240)


@pytest.mark.parametrize("check", [check.__name__ for check in reducing_worker.CHECKS])
def test_with_two_processes(printed: list[str], check: str) -> None:
    for rank, text in enumerate(printed):
        assert f"holds {check}\n" in text, f"rank {rank}:\n{text}"
