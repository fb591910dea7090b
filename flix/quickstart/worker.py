"""One arm with one seed, in a process of its own with one thread; reports to its parent in JSON lines.

python -m flix.quickstart.worker '{"arm": "flix", "seed": 0, "steps": 600, ...}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def emit(event: str, **fields: Any) -> None:
    """One line to the parent."""
    print(json.dumps({"event": event, **fields}), flush=True)


def run(job: dict[str, Any]) -> None:
    """Train and evaluate; the adapter and the answers go to ``job["out"]``."""
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    from flix.backends.torch import save

    from .arms import arms
    from .data import load_data
    from .evaluation import evaluate
    from .training import train_arm

    data = load_data(job.get("cache"))
    arm = next(arm for arm in arms(data) if arm.name == job["arm"])
    if job.get("learning_rate"):
        from dataclasses import replace

        arm = replace(arm, learning_rate=job["learning_rate"])

    def on_step(step: int, loss: float) -> None:
        if step % 10 == 0 or step == job["steps"]:
            emit("step", step=step, loss=loss)

    model, figures = train_arm(data, arm, seed=job["seed"], steps=job["steps"], on_step=on_step)
    began = time.monotonic()
    emit("evaluating")
    cells, found = evaluate(model, arm, data, job.get("split", "test"), job.get("limit"))
    figures["evaluation_seconds"] = round(time.monotonic() - began, 1)
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    save(model, out / "adapter")
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for answer in found:
            file.write(json.dumps(vars(answer), ensure_ascii=False) + "\n")
    emit("result", cells=cells, figures=figures, title=arm.title)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(json.loads(sys.argv[1]))
