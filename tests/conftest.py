"""What every test process needs before the first framework is loaded."""

import importlib.util
import os

if importlib.util.find_spec("triton") and not os.environ.get("FLIX_WITHOUT_FRAMEWORKS"):
    # torch loads triton late, and triton's LLVM ends a process in which TensorFlow's is loaded already; the other
    # order is fine. Tests load both frameworks, in any order.
    import triton  # noqa: F401
