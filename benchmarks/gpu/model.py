"""A whole decoder of a billion parameters with random weights in bfloat16: training steps and generation of mixed rows.

Llama's shape (transformers builds it from a configuration; nothing is downloaded). The step is forward, backward and
fused AdamW over 16 rows of 512 tokens; where memory does not suffice, activations are checkpointed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import flix
from benchmarks.common import Arm, Table, figure, over
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.problem import LORA_RANK, distance, draw_ids, set_strategy
from benchmarks.gpu.record import Record
from benchmarks.layer.problem import make_registry
from benchmarks.model.torch_models import require_grad
from flix.backends.torch import adapt, trainable_parameters

FROZEN, PEFT = "frozen model", f"PEFT, one LoRA of rank {LORA_RANK}"


def build(dry: bool, device: str) -> Any:
    """The base model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "vocab_size": 32000,
    }
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if dry:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "vocab_size": 64,
        }
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(max_position_embeddings=1024, pad_token_id=0, **sizes, **heads)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def checkpointed(model: Any, on: bool) -> None:
    """Switch activation checkpointing on or off, by either of its names in transformers."""
    word = "enable" if on else "disable"
    for name in (f"activation_checkpointing_{word}", f"gradient_checkpointing_{word}"):
        if hasattr(model, name):
            settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, name)(**(settings if on and name.startswith("gradient") else {}))
            return
    raise AttributeError("the model has no switch for activation checkpointing")


def training_arm(
    clock: Clock,
    name: str,
    model: Any,
    inputs: dict[str, Any],
    parameters: list[nn.Parameter],
    before: Callable[[], Any] = lambda: None,
) -> Arm:
    """Forward, backward and fused AdamW; the run returns the loss and the marks between its parts."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-12, fused=True) if parameters else None

    def run() -> Any:
        marks = [clock.mark()]
        loss = model(**inputs).loss
        marks.append(clock.mark())
        loss.backward()
        marks.append(clock.mark())
        if optimizer is not None:
            optimizer.step()
        marks.append(clock.mark())
        return loss.detach(), marks

    def reset() -> None:
        before()
        for parameter in parameters:
            parameter.grad = None

    return Arm(name, run, reset=reset, model=model)


def measure(
    record: Record, clock: Clock, title: str, arms: list[Arm], rounds: int, tokens: int
) -> None:
    """A table of training steps."""
    parts: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}

    def timed(arm: Arm) -> float:
        arm.reset()
        clock.sync()
        begin = clock.mark()
        with arm.around():
            loss, marks = arm.run()
        end = clock.mark()
        clock.sync()
        assert bool(loss.isfinite()), f"{arm.name}: loss {loss}"
        parts[arm.name].append([clock.between(a, b) for a, b in itertools.pairwise(marks)])
        return clock.between(begin, end)

    times = clock.times(arms, rounds, timed)
    columns = [over(times, arms[0].name)]
    one = next((arm.name for arm in arms if arm.name.startswith(PEFT)), None)
    if one is not None:
        columns.append(over(times, one))
    rows = []
    for arm in arms:
        split = [figure(values).median for values in zip(*parts[arm.name][-rounds:], strict=True)]
        peak = clock.peak(arm)
        ms = figure(times[arm.name])
        rows.append(
            [arm.name, ms, *(c[arm.name] for c in columns), *split, tokens / ms.median * 1e3, peak]
        )
    head = ["training step", "ms", "over frozen", *(["over PEFT"] if one else [])]
    head += ["forward, ms", "backward, ms", "AdamW, ms", "tokens a second", "peak MiB"]
    record.table(Table(title, head, rows, "Device time, the host's delays included."))
    record.put(title, {row[0]: row[1:] for row in rows})


def agree(arms: list[Arm], parameters: list[nn.Parameter]) -> float:
    """The largest relative difference of the gradients between strategies; half precision allows some hundredths."""
    found = []
    for arm in arms:
        arm.reset()
        with arm.around():
            loss, _ = arm.run()
        found.append([loss] + [p.grad.clone() for p in parameters if p.grad is not None])
        arm.reset()
    assert all(len(other) == len(found[0]) > 1 for other in found), "other features have gradients"
    return max(distance(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def run(record: Record) -> None:
    """The section."""
    clock = Clock(record.dry)
    rows, length, rounds = (2, 4, 1) if record.dry else (16, 512, 6)
    base = record.attempt("building the model", lambda: build(record.dry, clock.device))
    if base is None:
        return
    record.put("parameters", sum(p.numel() for p in base.parameters()))
    registry = make_registry(25)
    config = flix.FlixConfig(registry=registry, ranks=8)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, base.config.vocab_size, (rows, length), generator=generator)
    inputs: dict[str, Any] = {
        "input_ids": tokens.to(clock.device),
        "labels": tokens.to(clock.device),
    }
    ids = draw_ids(25, rows, 12, 12)
    flix_model = adapt(copy.deepcopy(base), config).train()
    trained = list(trainable_parameters(flix_model))
    with torch.no_grad():
        for parameter in trained:
            parameter.uniform_(-0.01, 0.01)
    routed = {**inputs, "flix_features": ids}
    frozen = copy.deepcopy(base).train()
    frozen.get_input_embeddings().register_forward_hook(require_grad)
    models: dict[str, Any] = {FROZEN: frozen}
    arms = [training_arm(clock, FROZEN, frozen, inputs, [])]
    for half in (True, False):
        name = f"{PEFT}{', bfloat16' if half else ', float32 (its default)'}"
        made = record.attempt(name, lambda half=half: peft_model(base, half))
        if made is not None:
            models[name] = made
            own = [p for p in made.parameters() if p.requires_grad]
            arms.append(training_arm(clock, name, made, inputs, own))
    strategies = []
    for strategy in ("auto", "gather", "masked", "fused"):
        arm = training_arm(
            clock, f"flix, {strategy}", flix_model, routed, trained, partial(set_strategy, flix_model, strategy)
        )  # fmt: skip
        if (
            record.attempt(f"a step of {arm.name}", lambda arm=arm: (arm.reset(), arm.run()))
            is not None
        ):
            strategies.append(arm)
    off = record.attempt("strategies agree", lambda: agree(strategies, trained))
    record.put("gradients of strategies differ by", off)
    size = record.data["figures"]["parameters"] / 1e9
    title = f"A training step of a decoder of {size:.2f} billion parameters, bfloat16, {rows} x {length} tokens"
    everything = [*arms, *strategies]

    def plain() -> None:
        measure(record, clock, title, everything, rounds, rows * length)

    plain_error = record.attempt(title, plain, needs=25.0) or record.data["errors"].get(title)
    few = [arm for arm in everything if arm.name in (FROZEN, "flix, fused", "flix, gather")]
    if plain_error and "OutOfMemory" in plain_error:
        few = everything
        torch.cuda.empty_cache()

    def with_checkpoints() -> None:
        for model in {id(arm.model): arm.model for arm in few}.values():
            checkpointed(model, True)
        try:
            name = f"{title}, activations checkpointed"
            measure(record, clock, name, few, max(1, rounds // 2), rows * length)
        finally:
            for model in {id(arm.model): arm.model for arm in few}.values():
                checkpointed(model, False)

    record.attempt("with activation checkpointing", with_checkpoints, needs=15.0)
    record.attempt("generation", lambda: generation(record, clock, models, flix_model), needs=20.0)


def peft_model(base: Any, half: bool) -> Any:
    """PEFT's LoRA for all rows on a copy of the base.

    Raises:
        ImportError: PEFT is not installed.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", init_lora_weights=False,
        lora_dropout=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(copy.deepcopy(base), settings, autocast_adapter_dtype=not half).train()


def generation(record: Record, clock: Clock, models: dict[str, Any], flix_model: Any) -> None:
    """Greedy generation for 64 rows; the host's part is most of it."""
    rows, given, new = (2, 4, 2) if record.dry else (64, 64, 16)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(1, flix_model.config.vocab_size, (rows, given), generator=generator)
    prompts = prompts.to(clock.device)
    ids: Tensor = draw_ids(25, rows, 12, 12)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    more: dict[str, Any] = {"attention_mask": torch.ones_like(prompts), **settings}
    arms = []
    for name, model in models.items():
        arms.append(Arm(name, partial(_generate, model.eval(), prompts, more)))
    for strategy in ("auto", "fused", "gather", "masked"):
        routed = {**more, "flix_features": ids}
        change = partial(set_strategy, flix_model, strategy)
        call = partial(_generate, flix_model.eval(), prompts, routed)
        arms.append(Arm(f"flix, {strategy}", call, reset=change))

    def timed(arm: Arm) -> float:
        arm.reset()
        clock.sync()
        begin = clock.mark()
        out = arm.run()
        end = clock.mark()
        clock.sync()
        assert out.shape == (rows, given + new)
        return clock.between(begin, end) / new

    times = clock.times(arms, 1 if record.dry else 3, timed)
    ratios = over(times, FROZEN)
    found = [[arm.name, figure(times[arm.name]), ratios[arm.name]] for arm in arms]
    title = f"Greedy generation of {new} tokens for {rows} rows"
    record.table(Table(title, ["generation", "ms a token of the batch", "over frozen"], found))
    record.put(title, {row[0]: row[1:] for row in found})


def _generate(model: Any, prompts: Tensor, settings: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.generate(input_ids=prompts, **settings)  # type: ignore[no-any-return]
