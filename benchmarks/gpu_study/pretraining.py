"""Pretrains the base: a byte-level T5 that writes spoilt lines as they were, for so many seconds."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_study.lines import Blocks, as_it_is
from benchmarks.gpu_study.words import Unlabelled
from flix.core.errors import TrainingError
from tools.pretrain import base_config, learning_rate, new_model
from tools.tokens import IGNORED, PAD

SIZE = {"d_model": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 6, "num_decoder_layers": 3, "num_heads": 6}  # fmt: skip
"""The base's architecture: about 18 million parameters."""
TINY = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1}
LEAST, MOST = 10_000_000, 30_000_000
TRIAL = 48
"""Steps of a throwaway model that are timed, after the first 16."""
LOG_EVERY = 50


@dataclass
class Pretraining:
    """How a base is pretrained.

    Attributes:
        data: what on.
        seconds: for how long, at most.
        seed: of values, batches and noise. Together with ``steps``, it decides everything but rounding.
        steps: how many; default: as many as fit, found by timing some.
        batch: lines in a step.
        rate: the highest learning rate.
        device: ``"cuda"`` or ``"cpu"``.
        size: the architecture.
        workers: processes that make batches.
    """

    data: Unlabelled
    seconds: float
    seed: int = 0
    steps: int | None = None
    batch: int = 512
    rate: float = 1e-3
    device: str = "cuda"
    size: dict[str, int] = field(default_factory=lambda: dict(SIZE))
    workers: int = field(default_factory=lambda: max(0, min(8, (os.cpu_count() or 1) - 2)))

    def run(self, out: Path) -> dict[str, Any]:
        """Pretrain, save the base in ``out``, and return the record.

        Raises:
            TrainingError: the loss became NaN or infinite.
        """
        began = time.monotonic()
        planned = self.steps or self._fitting(began)
        left = math.inf if self.steps else self.seconds - (time.monotonic() - began)
        model, found = self._trained(planned, left)
        save(model, out)
        return {
            "seed": self.seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "architecture": self.size,
            "words": sum(map(len, self.data.words().values())),
            "languages": sorted(self.data.rows),
            "compared": self.data.compared,
            "data": self.data.digest,
            "batch": self.batch,
            "learning_rate": self.rate,
            "precision": "bfloat16 autocast",
            "planned": planned,
            **found,
        }

    def _fitting(self, began: float) -> int:
        """As many steps as fit into the seconds, by the time that some take."""
        _, found = self._trained(TRIAL, math.inf)
        left = self.seconds - (time.monotonic() - began)
        return max(TRIAL, int(0.97 * left / found["seconds_a_step"]))

    def _trained(self, steps: int, seconds: float) -> tuple[Any, dict[str, Any]]:
        """A new model after so many steps. If the seconds run out first, its rate falls with them."""
        import torch

        torch.manual_seed(self.seed)
        model = new_model(base_config(**self.size)).to(self.device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        began, warmup, tokens, step = time.monotonic(), min(300, steps // 10 + 1), 0, 0
        curve: list[tuple[int, float]] = []
        recent: list[Any] = []
        timed = began
        for step, (source, labels) in enumerate(self._batches(steps), 1):
            spent = (time.monotonic() - began) / seconds
            if spent >= 1:
                step -= 1
                break
            done = max((step - 1) / steps, spent)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done * steps, steps, self.rate, warmup)  # type: ignore[arg-type]
            tokens += int((source != PAD).sum() + (labels != IGNORED).sum())
            ids, wanted = (torch.from_numpy(a).to(self.device, non_blocking=True).long() for a in (source, labels))  # fmt: skip
            with torch.autocast(self.device, torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=wanted).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent.append(loss.detach())
            if step == 16:
                recent[-1].item()  # waits for the device
                timed = time.monotonic()
            if step % LOG_EVERY == 0 or step == steps:
                curve.append((step, self._logged(step, steps, recent)))
                recent = []
        if recent:
            curve.append((step, self._logged(step, steps, recent)))
        now = time.monotonic()
        return model.eval(), {
            "steps": step,
            "seconds": round(now - began, 2),
            "seconds_a_step": (now - timed) / (step - 16) if step > 16 else (now - began) / step,
            "tokens": tokens,
            "tokens_a_second": round(tokens / (now - began)),
            "final_loss": curve[-1][1],
            "loss": curve,
        }

    def _logged(self, step: int, steps: int, losses: list[Any]) -> float:
        import torch

        mean = round(float(torch.stack(losses).float().mean()), 4)
        if not math.isfinite(mean):
            raise TrainingError(
                f"pretraining: the loss is {mean} at step {step}; try a lower --pretraining-rate than {self.rate:g}"
            )
        if step % (10 * LOG_EVERY) == 0 or step == steps:
            print(f"pretraining: step {step}/{steps}, loss {mean:.3f}", flush=True)
        return mean

    def _batches(self, steps: int) -> Iterator[tuple[Any, Any]]:
        from torch.utils.data import DataLoader

        blocks = Blocks(self.data.words(), self.data.rows, self.seed, steps, self.batch)
        loader: Any = DataLoader(
            blocks,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.workers,
            collate_fn=as_it_is,
        )
        count = 0
        for block in loader:
            for pair in block:
                if count == steps:
                    return
                count += 1
                yield pair


def parameters_of(size: dict[str, int]) -> int:
    """How many parameters an architecture has; no memory is taken."""
    import torch
    from transformers import T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(base_config(**size))
    return sum(p.numel() for p in model.parameters())


def save(model: Any, out: Path) -> None:
    """Save a base with the tokenizer of the quickstart's, whose bytes have the same ids."""
    from transformers.utils import logging

    from flix.quickstart.arms import BASE

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    shutil.copyfile(BASE / "tokenizer_config.json", out / "tokenizer_config.json")
