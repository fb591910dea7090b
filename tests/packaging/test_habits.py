"""What pytest is told in pyproject.toml does what CONTRIBUTING.md says."""

from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize("kind", [UserWarning, FutureWarning, RuntimeWarning])
def test_a_warning_that_is_not_listed_is_an_error(kind: type[Warning]) -> None:
    with pytest.raises(kind, match="not in the list"):
        warnings.warn("not in the list", kind, stacklevel=1)


def test_a_deprecation_of_flix_is_an_error_and_one_of_others_is_not() -> None:
    code = "import warnings\nwarnings.warn('old', DeprecationWarning, stacklevel=1)"
    exec(code, {"__name__": "somebody.else"})
    with pytest.raises(DeprecationWarning, match="old"):
        exec(code, {"__name__": "flix.core.features.registry"})
