"""Trainers and a loop of accelerate's whose features in use are averaged; started by test_reducing.py.

``python -m tests.transformers.reducing_worker FOLDER KIND...`` runs alone, with whole batches; launchers run it in two
processes, each with half of every batch. What came of it lies in ``<folder>/<rank>.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from flix.backends.torch import trainable_parameters
from flix.backends.torch.distributed import reduce_features
from flix.transformers import FlixCollator, numbered
from tests.helpers.torch import live_pairs
from tests.helpers.transformers import classifier, dataset, llama, rows, trainer

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def ended(model: Any) -> dict[str, Any]:
    """Values at the end, and what was sent."""
    reducer = model.flix_state.reducer
    found = {name: p.detach().clone() for name, p in live_pairs(model).items()}
    found |= {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("classifier")}  # fmt: skip
    sent = None if reducer is None else vars(reducer.total)
    return {"values": found, "traffic": sent}


def of_trainer(folder: Path, heads: bool, **changes: Any) -> dict[str, Any]:
    if heads:
        model = classifier()
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # processes draw masks of their own
    else:
        model = llama()
    made = trainer(
        folder / "out",
        model,
        dataset(24, "class" if heads else "tokens"),
        per_device_train_batch_size=6 // PROCESSES,
        num_train_epochs=2,
        max_grad_norm=0.05,
        **({"ddp_backend": "gloo"} if PROCESSES > 1 else {}),
        **changes,
    )
    made.evaluate(dataset(4, "class" if heads else "tokens"))
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    wrapped = type(made.model_wrapped).__name__
    return {**ended(made.model), "losses": losses, "wrapped": wrapped}


def of_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama().train()
    if PROCESSES > 1:
        reduce_features(model)
    collate = FlixCollator(model.flix_config, seed=5)
    held = [{k: v for k, v in row.items() if k != "text"} for row in rows(24, "tokens")]
    loader = torch.utils.data.DataLoader(
        held, batch_size=4 // PROCESSES, shuffle=True, collate_fn=collate
    )
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.01)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer, loader = accelerator.prepare(
        optimizer, numbered(loader, processes=accelerator.num_processes, seed=3)
    )
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return {**ended(model), "losses": losses, "wrapped": type(model).__name__}


def main(folder: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    kinds = {
        "features": lambda: of_trainer(folder, False),
        "heads": lambda: of_trainer(folder, True),
        "accumulated": lambda: of_trainer(folder, False, gradient_accumulation_steps=2),
        "accelerate": of_accelerate,
    }
    found = {name: kinds[name]() for name in chosen}
    torch.save(found, folder / f"{os.environ.get('RANK', '0')}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
