"""Quantised bases: what a training step costs over the quantised model's own, and what of its memory `adapt` changes.

The decoder of ``model``, its linear layers but the output head quantised: int8 weights by torchao, 8 and 4 bit by
bitsandbytes where it is installed. flix calls the layers' own forward and adds each row's features to it, so the base
for comparison is the quantised model alone, forward and backward to the embeddings.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import flix
from benchmarks.common import Arm, Table
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.model import PEFT, build, measure, peft_model, training_arm
from benchmarks.gpu.problem import dense, distance, draw_ids, set_strategy
from benchmarks.gpu.record import Record
from benchmarks.layer.problem import RANK, make_registry
from benchmarks.model.torch_models import require_grad
from benchmarks.torch_gradients import gradients_of
from flix.backends.torch import adapt, trainable_parameters

HEAD = "lm_head"
MIB = 2**20


def torchao_int8(model: nn.Module) -> nn.Module:
    """int8 weights, one scale for each output, in place.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and name != HEAD
    )
    return model.requires_grad_(False)


def bitsandbytes(kind: str, model: nn.Module) -> nn.Module:
    """``Linear8bitLt`` or ``Linear4bit`` (NF4) in place of the linear layers.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    import bitsandbytes as bnb

    settings: dict[str, Any] = {"has_fp16_weights": False}
    if kind == "Linear4bit":
        settings = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or path == HEAD:
            continue
        made = getattr(bnb.nn, kind)(layer.in_features, layer.out_features, False, **settings)
        made.load_state_dict({"weight": layer.weight.detach().cpu()})
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made.to(layer.weight.device))
    return model.requires_grad_(False)


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao, int8 weights": torchao_int8,
    "bitsandbytes, 8 bit": partial(bitsandbytes, "Linear8bitLt"),
    "bitsandbytes, 4 bit (NF4)": partial(bitsandbytes, "Linear4bit"),
}


def held(model: nn.Module) -> int:
    """Bytes of a model's tensors, those that quantised ones are made of and say (torchao's do) among them."""

    def parts(value: Any) -> Iterator[Tensor]:
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                if isinstance(part := getattr(value, name), Tensor):
                    yield from parts(part)
        else:
            yield value

    given = {id(v): v for v in (*model.parameters(), *model.buffers())}
    return sum(part.numel() * part.element_size() for v in given.values() for part in parts(v))


def allocated(clock: Clock) -> int | None:
    """Bytes in use on the device."""
    if not clock.cuda:
        return None
    gc.collect()
    clock.sync()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def guard(
    record: Record, clock: Clock, kind: str, quantise: Callable[[nn.Module], nn.Module]
) -> None:
    """An adapted quantised layer and its gradients: the layer's own output plus the definition's update.

    Raises:
        AssertionError: it is too far, or the kernel is not quantised.
    """
    d, dtype = 64 if record.dry else 1024, torch.bfloat16
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(d, 2 * d, bias=False, device=clock.device, dtype=dtype))
    full = held(plain)
    plain = quantise(plain.requires_grad_(False))  # type: ignore[assignment]
    config = flix.FlixConfig(registry=make_registry(25), ranks=RANK)
    ids = draw_ids(25, 4, 12, 12)
    model = adapt(copy.deepcopy(plain), config)
    layer: Any = model[0]
    pairs = {}
    with torch.no_grad():
        for feature in config.registry.features:
            a, b = layer.flix_A[feature], layer.flix_B[feature]
            a.normal_(std=d**-0.5)
            b.normal_(std=0.5 * RANK**-0.5)
            pairs |= {f"A {feature}": a, f"B {feature}": b}
    x = torch.randn(4, 32, d, device=clock.device, dtype=dtype)
    dy = torch.randn(4, 32, 2 * d, device=clock.device, dtype=dtype)
    sides = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    base, y = plain(sides[0]), model(sides[1], flix_features=ids)
    base.backward(dy)
    y.backward(dy)
    nothing = torch.zeros(2 * d, d, device=clock.device)
    update = dense(x, dy, nothing, None, pairs, config, ids)
    assert sides[0].grad is not None and sides[1].grad is not None
    wanted = {**update, "y": base.detach().double() + update["y"]}
    wanted["x"] = sides[0].grad.double() + update["x"]
    found = {"y": y, "x": sides[1].grad, **gradients_of(pairs, trainable_parameters(model))}
    far = {}
    for name, value in found.items():
        assert (value is None) == (name not in wanted), f"gradient of {name}"
        if value is not None:
            far[name] = distance(value, wanted[name])
    worst = max(far, key=lambda name: far[name])
    least = distance(base, wanted["y"])
    record.put(f"{kind}: differs from the definition by", {worst: far[worst], "base": least})
    assert far[worst] < 3e-2 < least / 3, f"{worst} is off by {far[worst]:.1e}, base {least:.1e}"
    assert kind.startswith("bits") or held(plain) < 0.7 * full, "the kernel is not quantised"


def memory(
    record: Record,
    clock: Clock,
    kind: str,
    build_base: Callable[[], Any],
    quantise: Callable[[nn.Module], nn.Module],
) -> tuple[Any, Any]:
    """A table of what the base holds before and after it is quantised and adapted; returns the base and the model."""
    at = [allocated(clock)]
    base = build_base()
    at.append(allocated(clock))
    counted = [held(base)]
    base = quantise(base)
    at.append(allocated(clock))
    counted.append(held(base))
    twin = copy.deepcopy(base)
    before, twin_before = allocated(clock), held(twin)
    model = adapt(twin, flix.FlixConfig(registry=make_registry(25), ranks=RANK)).train()
    own = sum(p.numel() * p.element_size() for p in trainable_parameters(model))
    after = allocated(clock)
    grown = None if after is None or before is None else (after - before - own) / MIB
    marks = [None if a is None or at[0] is None else (a - at[0]) / MIB for a in at[1:]]
    rows = [
        ["base, bfloat16", counted[0] / MIB, marks[0]],
        ["base, quantised", counted[1] / MIB, marks[1]],
        ["features, 25 of rank 8", own / MIB, None],
        ["what adapt added to the base", (held(model) - own - twin_before) / MIB, grown],
    ]
    columns = ["", "tensors, MiB", "on the device, MiB"]
    record.table(Table(f"Memory of the base: {kind}", columns, rows))
    record.put(f"Memory of the base: {kind}", {row[0]: row[1:] for row in rows})
    return base, model


def steps(
    record: Record, clock: Clock, kind: str, quantise: Callable[[nn.Module], nn.Module]
) -> None:
    """The tables of one kind of quantised base."""
    rows, length, rounds = (2, 4, 1) if record.dry else (16, 512, 5)
    base, model = memory(record, clock, kind, lambda: build(record.dry, clock.device), quantise)
    trained = list(trainable_parameters(model))
    with torch.no_grad():
        for parameter in trained:
            parameter.uniform_(-0.01, 0.01)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, base.config.vocab_size, (rows, length), generator=generator)
    tokens = tokens.to(clock.device)
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": tokens}

    def peft() -> Arm:
        lora = peft_model(base, True)
        own = [p for p in lora.parameters() if p.requires_grad]
        arm = training_arm(clock, f"{PEFT} over it, bfloat16", lora, inputs, own)
        arm.reset()
        arm.run()
        return arm

    peer = record.attempt(f"PEFT over {kind}", peft)
    base.train().get_input_embeddings().register_forward_hook(require_grad)
    arms = [training_arm(clock, "quantised model, frozen", base, inputs, [])]
    arms += [] if peer is None else [peer]
    routed = {**inputs, "flix_features": draw_ids(25, rows, 12, 12)}
    for strategy in ("auto", "gather", "masked"):
        name, change = f"flix over it, {strategy}", partial(set_strategy, model, strategy)
        arms.append(training_arm(clock, name, model, routed, trained, change))
    size = sum(p.numel() for p in base.parameters()) / 1e9
    title = f"{kind}: a training step of a decoder of {size:.2f} billion parameters, {rows} x {length} tokens"
    measure(record, clock, title, arms, rounds, rows * length)


def run(record: Record) -> None:
    """The section."""
    clock = Clock(record.dry)
    for kind, quantise in KINDS.items():
        small = nn.Sequential(nn.Linear(64, 64, bias=False, device=clock.device))
        installed = partial(quantise, small.to(torch.bfloat16).requires_grad_(False))
        if record.attempt(kind, installed) is None:
            continue
        record.attempt(
            f"{kind}, beside the definition", partial(guard, record, clock, kind, quantise)
        )
        call = partial(steps, record, clock, kind, quantise)
        record.attempt(f"{kind}, training steps", call, needs=12.0)
        if clock.cuda:
            torch.cuda.empty_cache()
