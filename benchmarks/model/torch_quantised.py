"""A training step over an int8 base (torchao), beside the quantised base's own and PEFT's, and what the base holds.

Decoders of Llama's form with random weights, two layers each, in three sizes: the part of a step that is the features'
falls with the size.

    python -m benchmarks.model.torch_quantised [--smoke]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Bar, Figure, Result, Table, environment, interleave, over
from benchmarks.model.problem import LORA_RANK, MixedBatch
from benchmarks.model.torch_model import FLIX, FROZEN, SINGLE, training_arms
from flix.backends.torch import trainable_parameters

PACKAGES = ("torch", "torchao", "transformers", "peft", "numpy")
SIZES = (512, 1024, 2048)
LENGTH = 64


def int8_decoder(d: int) -> nn.Module:
    """A decoder whose linear layers, all but the head, hold int8 weights and one scale for each output."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(2, d // 128)
    config = LlamaConfig(
        hidden_size=d, intermediate_size=11 * d // 4, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=512, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)

    def chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and path != "lm_head"

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=chosen)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def held(model: nn.Module, without: Any = ()) -> int:
    """Bytes of a model's tensors, those that quantised ones are made of among them."""

    def parts(value: Any) -> Iterator[Tensor]:
        if not hasattr(value, "__tensor_flatten__"):
            yield value
            return
        for name in value.__tensor_flatten__()[0]:
            yield from parts(getattr(value, name))

    left_out = {id(p) for p in without}
    given = {id(v): v for v in (*model.parameters(), *model.buffers()) if id(v) not in left_out}
    return sum(part.numel() * part.element_size() for v in given.values() for part in parts(v.data))


def _measured(d: int, smoke: bool) -> tuple[list[Any], Figure]:
    make, batch = partial(int8_decoder, d), MixedBatch(6, 4) if smoke else MixedBatch()
    shape = (len(batch.rows), 8 if smoke else LENGTH)
    tokens = torch.randint(2, 512, shape, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": tokens, "labels": tokens}
    arms, built = training_arms(make, batch, inputs, peers=False)
    base = held(make())
    more = held(built[FLIX], list(trainable_parameters(built[FLIX]))) - base
    times = interleave(arms, 1 if smoke else 8, warmup=0, limit=5.0 if smoke else 60.0)
    step = over(times, FROZEN)
    seconds = [statistics.median(times[name]) for name in (FROZEN, FLIX)]
    row = [f"{d:,}", *seconds, step[FLIX], step[SINGLE], base / 2**20, more]
    return row, step[FLIX]


def suite(smoke: bool = False) -> Result:
    """The int8 base's part of the benchmark."""
    torch.set_num_threads(1)
    result = Result(
        "model-int8", "Over an int8 base: torchao, PyTorch", environment=environment(PACKAGES)
    )
    rows, shares = [], {}
    for d in (64,) if smoke else SIZES:
        row, shares[d] = _measured(d, smoke)
        rows.append(row)
    head = ["d", "frozen, s", "flix, s", "flix over frozen", f"PEFT's one LoRA of rank {LORA_RANK} over frozen"]  # fmt: skip
    note = (
        "A training step of a decoder of two layers: forward, backward and fused AdamW; the quantised base's own has no optimizer, and "
        "its backward runs to the embeddings. The last columns: what the quantised base holds, and by how many bytes it "
        "holds more once it is adapted, the features left out."
    )
    table = Table("", [*head, "base, MiB", "more after adapt, bytes"], rows, note)
    table.title = "A training step over int8 weights"
    result.tables.append(table)
    batch = MixedBatch(6, 4) if smoke else MixedBatch()
    result.method = f"Random weights, all linear layers but the head adapted; {batch.describe()}; {LENGTH} positions."
    for d in shares if smoke else SIZES[1:]:
        result.bars.append(Bar(f"step over an int8 base of d = {d:,}, over its own", shares[d], 1.2))  # fmt: skip
    return result


if __name__ == "__main__":
    from benchmarks.report import section

    print(section(suite("--smoke" in sys.argv).to_dict()))
