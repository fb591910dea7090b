"""The core's tests run where no framework can be imported, if FLIX_WITHOUT_FRAMEWORKS is set (make test sets it)."""

from __future__ import annotations

import os
import sys

FRAMEWORKS = ("torch", "jax", "flax", "tensorflow", "keras", "transformers", "peft", "datasets")


class _Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FRAMEWORKS:
            raise ImportError(f"{name} is not to be imported by the core or its tests")
        return None


if os.environ.get("FLIX_WITHOUT_FRAMEWORKS"):
    sys.meta_path.insert(0, _Refuse())
