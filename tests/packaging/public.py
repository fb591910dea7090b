"""The public interface as text: ``python -m tests.packaging.public`` writes public.txt, which a test compares.

Public is what one of these modules has in ``__all__``, and what a class among it has without an underscore.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("public.txt")
# What each needs beside numpy.
MODULES = {
    "flix": (),
    "flix.ranks": (),
    "flix.backends": (),
    "flix.backends.protocol": (),
    "flix.backends.verbs": (),
    "flix.backends.torch": ("torch",),
    "flix.backends.torch.distributed": ("torch",),
    "flix.backends.jax": ("jax", "flax", "optax"),
    "flix.backends.keras": ("keras",),
    "flix.backends.tensorflow": ("tensorflow",),
    "flix.data": ("datasets",),
    "flix.hub": ("huggingface_hub",),
    "flix.report": ("jinja2",),
    "flix.study.words": ("datasets",),
    "flix.tasks": ("transformers",),
    "flix.training": ("transformers",),
    "flix.transformers": ("transformers",),
    "flix_conformance": ("hypothesis",),
}


def called(what: Any) -> str:
    """Its parameters as a caller sees them: names, ``*``, ``/``, and ``=`` where there is a default."""
    try:
        signature = inspect.signature(what)
    except (TypeError, ValueError):
        return ""
    bare = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=inspect.Parameter.empty if parameter.default is parameter.empty else _Default(),
        )
        for parameter in signature.parameters.values()
        if not parameter.name.startswith("_") and parameter.name not in ("self", "cls")
    ]
    return str(inspect.Signature(bare)).replace("=\0", "=")


class _Default:
    def __repr__(self) -> str:
        return "\0"


def members(name: str, kind: type) -> Iterator[str]:
    """The public members that flix itself gives a class."""
    ours = [c for c in kind.__mro__ if c.__module__.partition(".")[0].startswith("flix")]
    for member in sorted({m for c in ours for m in vars(c) if not m.startswith("_")}):
        value = inspect.getattr_static(kind, member)
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        yield f"{name}.{member}{called(value) if inspect.isfunction(value) else ''}"


def names(module: str) -> list[str]:
    """A module's public names, each with its parameters."""
    loaded = importlib.import_module(module)
    public = getattr(loaded, "__all__", None) or [
        n
        for n, v in vars(loaded).items()
        if not n.startswith("_") and getattr(v, "__module__", None) == module
    ]
    found = []
    for name in sorted(public):
        value = getattr(loaded, name)
        full = f"{module}.{name}"
        if inspect.isclass(value):
            error = issubclass(
                value, BaseException
            )  # whose signature is not the same in every Python
            found += [full + ("" if error else called(value)), *members(full, value)]
        else:
            found.append(full + (called(value) if callable(value) else ""))
    return found


def main() -> None:
    """Writes the list."""
    importlib.import_module("tests.conftest")  # triton before TensorFlow, see there
    parts = ["\n".join([f"# {module}", *names(module)]) for module in MODULES]
    FILE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
