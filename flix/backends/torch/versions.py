"""Releases of transformers whose models are refused: what they answer was not seen to be right.

The tests pass with 5.3. With 4.57, T5's and BART's adapted embeddings differed from the reference of the tests; with
5.0, experts could not be adapted.
"""

from __future__ import annotations

import re
import sys

from torch import nn

from flix.core.errors import MissingFrameworkError

TRANSFORMERS = (5, 3)
"""The oldest release that is adapted, as major and minor; pyproject.toml declares the same."""


def require_known(model: nn.Module) -> None:
    """Refuse a model of a transformers that is too old.

    Raises:
        MissingFrameworkError: the model is one of transformers', which is older than :data:`TRANSFORMERS`.
    """
    library = sys.modules.get("transformers.modeling_utils")
    kind = getattr(library, "PreTrainedModel", ())
    if not any(isinstance(module, kind) for module in model.modules()):
        return
    version = str(getattr(sys.modules["transformers"], "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= TRANSFORMERS:
        return
    least = ".".join(map(str, TRANSFORMERS))
    raise MissingFrameworkError(
        f"{type(model).__name__} is a model of transformers {version}, but flix adapts models of transformers {least} and "
        f"later; upgrade it with: pip install 'transformers>={least}'"
    )
