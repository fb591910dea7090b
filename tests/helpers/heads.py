"""What the heads and bases of every backend are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flix
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.base import fingerprint, places
from flix.core.adapter.described import Head
from tests.helpers.stops import leftovers, stops


def wrong_heads(
    folder: Path, wrong: Iterable[tuple[str, tuple[int, ...], str]]
) -> Iterator[AbstractContextManager[Any]]:
    """Put one head after the other, all zeros, into the folder's adapter, in place of all others.

    Args:
        folder: where the adapter is.
        wrong: of each head, its name, its shape, and what the error of a load must say.

    Yields:
        What to load the folder in.
    """
    found = flix.load_adapter(folder)
    for name, shape, message in wrong:
        head = Head("F32", np.zeros(shape, "f4"))
        flix.save_adapter(replace(found, heads={name: head}), folder)
        yield pytest.raises(flix.AdapterError, match=message)


def check_every_stop(
    folder: Path, models: list[Any], save: Callable[[Any], object], read: Callable[[], set[float]]
) -> None:
    """Stop a save of the second model over the first at every file operation: one of them is what loads.

    Args:
        folder: where they are saved.
        models: the first, whose values are all 1, and the second, whose values are all 2.
        save: saves one there.
        read: loads what is there; the values that it holds.
    """
    old, new = models
    save(old)
    seen = []
    for stopped in stops(lambda: save(new)):
        (version,) = {float(value) for value in read()}
        seen.append(version)
        assert len(leftovers(folder)) <= 1
        if stopped:
            save(old)
    assert set(seen) == {1.0, 2.0} and seen[-1] == 2.0 and leftovers(folder) == []


def fingerprint_of(layers: Mapping[str, LayerShape], kernels: Mapping[str, Any]) -> str | None:
    """The fingerprint of a base, of whole kernels ``[d_out, d_in]`` (an embedding's: ``[d_out, vocabulary]``)."""
    samples = {}
    for path in layers:
        kernel = np.asarray(kernels[path])
        where = places(LayerShape(kernel.shape[1], kernel.shape[0]))
        samples[path] = kernel[where.rows, where.columns]
    return fingerprint(layers, samples)
