"""The version that the build wrote from the tag; in a tree that nobody built, the next one that is not released."""

try:
    from flix._built import version as __version__
except ImportError:
    __version__ = "0.1.dev0"

__all__ = ["__version__"]
