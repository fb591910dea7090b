"""Rows that know their place in the run, so that feature dropout can be keyed by it.

A collator sees rows, not steps: the Trainer fetches batches ahead, leaves out those before a resumed step, and
workers collate in processes of their own. So the sampler hands each index on together with (micro-step, row), and the
dataset puts that pair into the row, under :data:`NUMBER`. It travels with the row wherever the row is collated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    get_worker_info,
)

from flix.core.errors import ConfigError

NUMBER = "flix_row"
"""The column of a row's number, (micro-step, row within the step's batch over all processes)."""

# Streams have no length that would tell how many steps an epoch has: their epochs are numbered far apart.
_STREAM_EPOCH = 2**40


class Place(NamedTuple):
    """An index into a dataset, with the number of the row that is to carry it."""

    index: Any
    step: int
    row: int


class NumberedSampler(Sampler[Place]):
    """Another sampler's indices with their numbers, which go on from epoch to epoch.

    Args:
        sampler: gives the indices of an epoch.
        rows_a_step: rows of a micro-step over all processes.
        drop_last: whether the last step of an epoch is left out if it is not full.
        seed: if given, the epochs of a random sampler are drawn from (seed, epoch), the same in every process.
    """

    def __init__(
        self,
        sampler: Any,
        rows_a_step: int,
        *,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.rows_a_step = rows_a_step
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Number, and draw, the epoch with this number next."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Place]:
        whole, rest = divmod(len(self), self.rows_a_step)
        first = self.epoch * (whole + (rest > 0 and not self.drop_last))
        sampler = self.sampler
        if self.seed is not None and isinstance(sampler, RandomSampler):
            sampler = copy.copy(sampler)
            sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for position, index in enumerate(sampler):
            step, row = divmod(position, self.rows_a_step)
            yield Place(index, first + step, row)


class NumberedRows(Dataset[dict[str, Any]]):
    """A dataset of mappings whose rows carry their numbers where they are asked for by :class:`Place`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, Place):
            return _numbered(self.dataset[key.index], key.step, key.row)
        return self.dataset[key]

    def __getitems__(self, keys: Sequence[Any]) -> list[Any]:
        places = [key if isinstance(key, Place) else None for key in keys]
        indices = [key if place is None else place.index for key, place in zip(keys, places, strict=True)]  # fmt: skip
        fetch = getattr(self.dataset, "__getitems__", None)
        rows = fetch(indices) if fetch is not None else [self.dataset[i] for i in indices]
        return [
            row if place is None else _numbered(row, place.step, place.row)
            for row, place in zip(rows, places, strict=True)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the dataset, if it takes it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class NumberedStream(IterableDataset[dict[str, Any]]):
    """An iterable dataset whose rows carry their numbers.

    The rows of a worker are numbered as the loader will batch them: it takes batches from its workers in turn. The
    numbers are the same whenever the run has the same number of workers.

    Args:
        dataset: gives the rows, in each worker its own.
        batch_size: rows of a batch of the loader.
        processes: batches of a micro-step.
    """

    def __init__(self, dataset: Any, batch_size: int, processes: int = 1) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.processes = processes
        # In shared memory: workers that live on learn of a new epoch.
        epoch: Any = torch.zeros((), dtype=torch.int64)
        self._epoch = epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Number the epoch with this number next."""
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        first = int(self._epoch) * _STREAM_EPOCH
        for count, row in enumerate(self.dataset):
            batch, place = divmod(count, self.batch_size)
            step, part = divmod(batch * workers + worker, self.processes)
            yield _numbered(row, first + step, part * self.batch_size + place)


def _numbered(row: Any, step: int, number: int) -> dict[str, Any]:
    try:
        return {**row, NUMBER: (step, number)}
    except TypeError:
        raise ConfigError(
            f"feature dropout by step needs rows that are mappings of columns, got {type(row).__name__}"
        ) from None


def numbered(loader: DataLoader[Any], *, processes: int = 1, seed: int = 0) -> DataLoader[Any]:
    """The same loader, with rows that carry their numbers, for a loop of your own with feature dropout.

    Give it a plain ``DataLoader``, before ``Accelerator.prepare``::

        loader = numbered(DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collator), processes=n)

    The numbers continue over epochs if the loop calls ``loader.sampler.set_epoch(epoch)``; a loader that accelerate
    prepared does this itself. Workers, fetching ahead, ``skip_first_batches`` and the split over processes do not
    change them.

    Args:
        loader: made with ``batch_size`` (and ``shuffle`` or ``sampler``), or of an iterable dataset.
        processes: the number of processes among which accelerate will split the batches,
            ``accelerator.num_processes``.
        seed: the seed of the order under ``shuffle=True``. Each epoch has a new order, which is the same in every
            process and in every resumed run.

    Raises:
        ConfigError: a loader with a batch sampler of its own, or without batches.
    """
    if loader.batch_size is None:
        raise ConfigError(
            "numbered() needs a loader made with batch_size; with a batch sampler of your own, call "
            "the collator with step= instead"
        )
    common: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        # Of its own: a resumed loop makes its iterator at another moment, and must not draw from the model's then.
        "generator": loader.generator or torch.Generator().manual_seed(seed),
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    if isinstance(loader.dataset, IterableDataset):
        stream = NumberedStream(loader.dataset, loader.batch_size, processes)
        return DataLoader(
            stream, batch_size=loader.batch_size, drop_last=loader.drop_last, **common
        )
    sampler = NumberedSampler(
        loader.sampler, loader.batch_size * processes, drop_last=loader.drop_last, seed=seed
    )
    return DataLoader(
        NumberedRows(loader.dataset),
        batch_size=loader.batch_size,
        sampler=sampler,  # type: ignore[arg-type]
        drop_last=loader.drop_last,
        **common,
    )


def number_prepared(loader: Any) -> bool:
    """Number the rows of a loader that accelerate prepared, whose dataset is a :class:`NumberedRows`.

    Returns:
        Whether its sampler could be reached; not so with batch samplers that have none.
    """
    held = loader.batch_sampler
    chain = [held]
    while hasattr(chain[-1], "batch_sampler"):
        chain.append(chain[-1].batch_sampler)
    inner = chain[-1]
    if not isinstance(inner, BatchSampler) or getattr(inner, "sampler", None) is None:
        return False
    sampler = NumberedSampler(
        inner.sampler, loader.total_batch_size, drop_last=bool(inner.drop_last)
    )
    for each in chain:
        # On every level, as accelerate itself puts samplers there: this is how set_epoch finds them.
        each.sampler = sampler
    return True
