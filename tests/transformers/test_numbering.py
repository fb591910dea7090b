"""Loaders whose rows have the numbers of their steps."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import flix  # noqa: E402
from flix.transformers import FlixCollator, numbered  # noqa: E402
from tests.helpers.transformers import config, row  # noqa: E402


@pytest.mark.parametrize("workers", [0, 2])
def test_numbered_loaders(workers: int) -> None:
    """Shuffled, over two epochs: every batch has the mask of its step, and a skipped batch changes none."""
    from accelerate import skip_first_batches

    rows = [row(labels=i) for i in range(11)]
    collate = FlixCollator(config(), seed=2)

    def loader() -> Any:
        return numbered(
            torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate, num_workers=workers),
            seed=1,
        )  # fmt: skip

    mine, orders, step = loader(), [], 0
    for epoch in range(2):
        mine.sampler.set_epoch(epoch)
        orders.append([])
        for batch in mine:
            wanted = collate([rows[i] for i in batch["labels"].tolist()], step=step)
            assert torch.equal(batch["flix_features"], wanted["flix_features"])
            orders[-1] += batch["labels"].tolist()
            step += 1
    assert step == 6 and orders[0] != orders[1] and sorted(orders[0]) == list(range(11))
    torch.manual_seed(77)
    again = loader()
    again.sampler.set_epoch(1)
    resumed = list(skip_first_batches(again, 2))
    assert len(resumed) == 1 and resumed[0]["labels"].tolist() == orders[1][8:]
    assert torch.equal(resumed[0]["flix_features"], batch["flix_features"])


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
    """Rows shared out among workers."""

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from ({"number": i} for i in range(first, 16, step))


def places(rows: list[Any]) -> list[Any]:
    return [row["flix_row"] for row in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_numbered_streams(workers: int) -> None:
    """Batches are numbered in the order in which the loader gives them, over workers and epochs."""
    loader = torch.utils.data.DataLoader(
        Stream(), batch_size=2, num_workers=workers, persistent_workers=workers > 0, collate_fn=places
    )  # fmt: skip
    mine = numbered(loader, processes=2)
    first = [place for batch in mine for place in batch]
    assert first == [(step, row) for step in range(4) for row in range(4)]
    mine.dataset.set_epoch(1)
    second = [place for batch in mine for place in batch]
    assert len({*first, *second}) == 32 and [row for _, row in second] == [row for _, row in first]


def test_numbered_refuses_batch_samplers() -> None:
    batches = torch.utils.data.BatchSampler(range(4), 2, False)
    loader = torch.utils.data.DataLoader(list(range(4)), batch_sampler=batches)
    with pytest.raises(flix.ConfigError, match="made with batch_size"):
        numbered(loader)
    plain = numbered(torch.utils.data.DataLoader(list(range(4)), batch_size=2))
    with pytest.raises(flix.ConfigError, match="mappings of columns, got int"):
        next(iter(plain))
