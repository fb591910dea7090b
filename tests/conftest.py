"""What every test process needs before the first framework is loaded, and what it lets go of between modules."""

import gc
import importlib.util
import os
import sys

import pytest

if importlib.util.find_spec("triton") and not os.environ.get("FLIX_WITHOUT_FRAMEWORKS"):
    # torch loads triton late, and triton's LLVM ends a process in which TensorFlow's is loaded already; the other
    # order is fine. Tests load both frameworks, in any order.
    import triton  # noqa: F401


def pytest_collection_finish():
    """The frameworks' millions of objects are no garbage, and Keras and JAX call the collector hundreds of times."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def programs_let_go():
    """Compiled programs are kept for as long as a process lives: workers of the whole suite came to 7 GB each."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
