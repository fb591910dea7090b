"""One process of a run with accelerate or the Trainer; started by test_accelerate.py.

Writes what it trained on and what came of it to ``<folder>/<process>.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from flix.transformers import FlixCollator, numbered
from tests.helpers.torch import live_pairs
from tests.helpers.transformers import classifier, dataset, rows, trainer


def with_trainer(folder: Path) -> dict[str, Any]:
    made = trainer(
        folder / "out",
        data=dataset(26),
        per_device_train_batch_size=3,
        num_train_epochs=2,
        eval_dataset=dataset(7),
        per_device_eval_batch_size=2,
        logging_steps=3,
        save_strategy="epoch",
        ddp_backend="gloo",
    )
    before = made.evaluate()
    made.train()
    return {
        "before": before,
        "processes": made.accelerator.num_processes,
        "seen": [ids.tolist() for ids in made.seen],
        "log": made.state.log_history,
        "sum": sum(float(p.detach().double().abs().sum()) for p in live_pairs(made.model).values()),
    }


def with_accelerate(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = classifier()
    collate = FlixCollator(model.flix_config, seed=5)
    held = [
        {**{k: v for k, v in r.items() if k != "text"}, "number": i} for i, r in enumerate(rows(22))
    ]
    loader = numbered(
        torch.utils.data.DataLoader(held, batch_size=3, shuffle=True, collate_fn=collate),
        processes=accelerator.num_processes,
    )
    loader = accelerator.prepare(loader)
    seen = []
    for _ in range(2):
        for batch in loader:
            seen.append([batch["number"].tolist(), batch["flix_features"].tolist()])
    return {"processes": accelerator.num_processes, "seen": seen}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, where = sys.argv[1], Path(sys.argv[2])
    found = {"trainer": with_trainer, "accelerate": with_accelerate}[kind](where)
    import os

    (where / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
