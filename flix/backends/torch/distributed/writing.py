"""Files that several processes write together: the first writes, and all know how it went."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from flix.core.errors import AdapterError


def together() -> bool:
    """Whether there are processes to agree with."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if together() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if together() else 1


@contextmanager
def one_writes() -> Iterator[bool]:
    """Whether this process is the first, which writes; the others wait until it has.

    Raises:
        AdapterError: in the others, where the first has failed.
    """
    failed: Exception | None = None
    try:
        yield rank() == 0
    except Exception as error:
        failed = error
    said = told(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    if said is not None:
        raise AdapterError(f"the first process, which writes for all, could not: {said}")


def told(value: Any) -> Any:
    """What the first process says, in all processes."""
    if not together():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, device=_device())
    return held[0]


def _device() -> torch.device:
    """Where the default group exchanges objects."""
    if "gloo" in dist.get_backend():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
