"""What paged banks cost: training steps of one small model whose features are ten times what the device may hold.

Three copies of a Llama-like model with the same values: with all features on the device; paged within a budget of a
tenth; and the same with the coming batch's features fetched ahead. They train on the same batches, whose features are
drawn anew every step, and must have the same losses, bit for bit, throughout.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flix
from benchmarks.common import Arm, Result, Table, environment, interleave, median_ms, over
from benchmarks.guards import GuardError
from flix.backends.torch import adapt, page, trainable_parameters

ROWS, VOCABULARY = 8, 512


def _model(size: int, layers: int, features: int) -> torch.nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        )
    )  # fmt: skip
    names = [f"f{i}" for i in range(features)]
    registry = flix.FeatureRegistry({"language": names, "task": ["a", "b"]})
    return adapt(base, flix.FlixConfig(registry=registry, ranks=8)).train()


def _batches(features: int, length: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(step)
        language = rng.integers(0, features, ROWS)
        ids = np.stack([language, features + rng.integers(0, 2, ROWS)], 1)
        tokens = rng.integers(0, VOCABULARY, (ROWS, length))
        return torch.from_numpy(tokens), torch.from_numpy(ids)

    return batch


def _arm(name: str, model: torch.nn.Module, batch: Any, pager: Any, ahead: bool) -> Arm:
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-3, fused=True)
    step = [0]

    def run() -> dict[str, Any]:
        tokens, ids = batch(step[0])
        loss = model(input_ids=tokens, labels=tokens, flix_features=ids).loss
        if ahead:
            pager.prefetch(batch(step[0] + 1)[1])
        loss.backward()
        optimizer.step()
        step[0] += 1
        return {"loss": loss.detach()}

    return Arm(name, run, reset=lambda: optimizer.zero_grad(set_to_none=True))


def suite(smoke: bool = False) -> Result:
    """The paging part of the benchmark."""
    torch.set_num_threads(1)
    size, layers, features, length = (16, 1, 100, 8) if smoke else (256, 6, 200, 64)
    plain = _model(size, layers, features)
    total = sum(p.nbytes for p in trainable_parameters(plain))
    batch, arms, pagers = _batches(features, length), [], {}
    for name, share, ahead in (
        ("all on the device", None, False),
        ("paged, a tenth", 10, False),
        ("paged, a fifth, the next batch ahead", 5, True),
    ):
        model = copy.deepcopy(plain)
        pager = None if share is None else page(model, total // share)
        pagers[name] = pager
        arms.append(_arm(name, model, batch, pager, ahead))
    losses: dict[str, list[float]] = {arm.name: [] for arm in arms}
    times = interleave(
        arms, 3 if smoke else 25, seen=lambda name, out: losses[name].append(out["loss"].item())
    )
    first = losses[arms[0].name]
    for name, found in losses.items():
        if found != first or not np.isfinite(found).all():
            raise GuardError(
                f"{name}: the losses are not those of {arms[0].name!r}: {found} {first}"
            )
    rows = []
    for name, ratio in over(times, arms[0].name).items():
        pager = pagers[name]
        held = total if pager is None else pager.peak
        steps = len(times[name]) + 2
        copied = 0.0 if pager is None else pager.copied / steps / 2**20
        rows.append([name, median_ms(times[name]), ratio, held / 2**20, copied])
    result = Result(
        "scale-paging", "Paged banks", environment=environment(("torch", "transformers"))
    )
    result.tables.append(
        Table(
            "A training step, features in host memory",
            ["features", "ms a step", "over all", "held at most, MiB", "copied a step, MiB"],
            rows,
        )
    )
    result.method = (
        f"Training steps with AdamW of a Llama-like model (d = {size}, {layers} blocks), {features + 2} features of rank 8 "
        f"({total / 2**20:.0f} MiB); {ROWS} rows of {length} positions, the languages drawn anew every step. A batch ahead "
        "needs room for two batches. The device is the CPU here: a copy costs what copying in memory costs, and does not "
        "overlap with the step."
    )
    return result


if __name__ == "__main__":
    from benchmarks.report import section

    print(section(suite("--smoke" in sys.argv).to_dict()))
