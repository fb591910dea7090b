"""Puts the kit's sources, and the example backend's, on the path: the meta-tests need no installation."""

import sys
from pathlib import Path

_KIT = Path(__file__).parents[1]
for folder in (_KIT / "src", _KIT / "example_backend" / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
