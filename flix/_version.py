"""The version that the build wrote from the tag; in a tree that nobody built, the next one that is not released."""

from importlib import import_module

try:
    # By name: where there is no such module, import-linter would count it as an import of flix.
    __version__: str = import_module("flix._built").version
except ImportError:
    __version__ = "0.1.dev0"

__all__ = ["__version__"]
