"""Adapted models in several processes (docs/specification.md §5.2)."""

from flix.backends.torch.distributed.agreement import touched_by_all

__all__ = ["touched_by_all"]
