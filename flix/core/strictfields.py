"""Types of the fields of forms: names and numbers, with bounds, none of them a truth value by mistake."""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import AfterValidator, BeforeValidator, Field, StrictStr
from pydantic_core import PydanticCustomError


def _no_bool(value: Any) -> Any:
    """A number; YAML reads on, yes and their like as truth values, which count as 0 and 1 in Python."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "must be a number")
    return value


def _of_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a NUL character, which no name and no path can contain")
    return value


# Bounds are far above all use: they keep a slip of the keyboard from taking all memory.
Number = BeforeValidator(_no_bool)
Name = Annotated[StrictStr, Field(min_length=1), AfterValidator(_of_text)]
Count = Annotated[int, Number, Field(ge=1, le=10**9)]
CountOr0 = Annotated[int, Number, Field(ge=0, le=10**9)]
Rank = Annotated[int, Number, Field(ge=0, le=10**6)]
Names = Union[Name, list[Name]]
Finite = Annotated[float, Number, Field(allow_inf_nan=False)]
FeatureValue = Union[Name, list[Name], dict[Name, Finite]]
Rate = Annotated[float, Number, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Number, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Number, Field(ge=0.0, allow_inf_nan=False)]
