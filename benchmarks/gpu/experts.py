"""A mixture of experts of Qwen3-MoE's shape (64 experts, 8 for each token) in bfloat16: training steps of mixed rows.

Random weights, nothing is downloaded. First a module of experts is held to its definition in float64. Then whole steps:
the frozen model's (forward, and backward to the embeddings), PEFT's with one LoRA for all rows, where its version knows
parameters as targets, and flix's with fused AdamW; last the same with 1,000 registered features, in a smaller model.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import flix
from benchmarks.common import Arm, Table, figure, over
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.model import FROZEN, PEFT, measure, training_arm
from benchmarks.gpu.problem import LORA_RANK, distance, draw_ids
from benchmarks.gpu.record import Record
from benchmarks.layer.problem import RANK, make_registry
from benchmarks.model.torch_models import require_grad
from benchmarks.torch_gradients import gradients_of
from flix.backends.torch import adapt, trainable_parameters

EXPERTS, EACH = 64, 8
SIZES = (2048, 1024, 512)
"""Hidden sizes; an expert's inner one is 3/8 of it, as in Qwen3-30B-A3B."""


def build(d: int, layers: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The base model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    heads = max(2, d // 128)
    config = Qwen3MoeConfig(
        hidden_size=d, moe_intermediate_size=3 * d // 8, intermediate_size=d, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=d // heads, vocab_size=1024,
        num_experts=EXPERTS, num_experts_per_tok=EACH, max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3MoeForCausalLM(config).to(dtype).requires_grad_(False)


def flix_model(base: Any, features: int) -> Any:
    """A copy of the base, adapted, with small values everywhere."""
    config = flix.FlixConfig(registry=make_registry(features), ranks=RANK)
    model = adapt(copy.deepcopy(base), config).train()
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.uniform_(-0.01, 0.01)
    return model


def peft_model(base: Any) -> Any:
    """PEFT's LoRA for all rows on a copy of the base, its experts among the targets, in the base's dtype.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: it does not know parameters as targets.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_RANK, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    return get_peft_model(copy.deepcopy(base), settings, autocast_adapter_dtype=False).train()


class Block(nn.Module):
    """A module of experts for rows of tokens, without the router.

    Args:
        experts: the module.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        found = self.experts(x.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1))
        return found.view_as(x)  # type: ignore[no-any-return]


def definition(
    module: Any,
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    pairs: dict[str, list[dict[Any, tuple[Any, Any]]]],
    rows: list[list[Any]],
    scale: float,
) -> Tensor:
    """The experts' weighted sum from the definition, row by row and expert by expert, in the tokens' dtype.

    Args:
        module: an adapted module of experts.
        tokens: ``[N, S, d]``.
        index, weights: the experts that each is sent to and their weights, ``[N, S, k]``.
        pairs: by kernel and expert: A ``[r, d_in]`` and B ``[d_out, r]`` by feature.
        rows: the features of each row.
        scale: s_f.
    """
    y = torch.zeros_like(tokens)
    kernels = {name: getattr(module, name).detach().to(tokens.dtype) for name in pairs}

    def product(name: str, e: int, x: Tensor, features: list[Any]) -> Tensor:
        total = x @ kernels[name][e].t()
        for a, b in (pairs[name][e][feature] for feature in features):
            total = total + scale * ((x @ a.t()) @ b.t())
        return total

    for n, features in enumerate(rows):
        for e in range(EXPERTS):
            at, place = (index[n] == e).nonzero(as_tuple=True)
            if len(at):
                inner = module._apply_gate(product("gate_up_proj", e, tokens[n, at], features))
                out = product("down_proj", e, inner, features)
                y = y.index_put(
                    (torch.full_like(at, n), at),
                    weights[n, at, place].unsqueeze(1) * out,
                    accumulate=True,
                )
    return y


def guard(record: Record, clock: Clock, d: int, length: int) -> None:
    """A module of experts and its gradients beside the definition; an update of little weight would prove nothing.

    Raises:
        AssertionError: it is too far.
    """
    dtype = torch.float32 if record.dry else torch.bfloat16
    config = flix.FlixConfig(registry=make_registry(6), ranks=RANK)
    model = adapt(Block(build(d, 1, clock.device, dtype).model.layers[0].mlp.experts), config)
    module: Any = model.experts
    kernels, features = module.flix_kernels, config.registry.features
    ids = torch.tensor([[0, 4], [1, 4], [0, -1], [2, 5]])
    rows = [[features[i] for i in row if i >= 0] for row in ids.tolist()]
    used = sorted({feature for row in rows for feature in row})
    generator = torch.Generator(clock.device).manual_seed(1)
    drawn = partial(torch.randn, generator=generator, device=clock.device)
    held: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, kernel in kernels.items():
            for feature in features:
                a, b = kernel.flix_A[feature], kernel.flix_B[feature]
                a.copy_(drawn(a.shape) * a.shape[-1] ** -0.5)
                b.copy_(drawn(b.shape) * 0.1 * RANK**-0.5)
                if feature in used:
                    held |= {f"{name}, A of {feature}": a, f"{name}, B of {feature}": b}
    x = drawn(4, length, d).to(dtype).requires_grad_()
    weights, index = drawn(4, length, EXPERTS).softmax(-1).topk(EACH)
    weights = weights.to(dtype)
    dy = drawn(4, length, d).to(dtype)
    y = model(x, index, weights, flix_features=ids)
    y.backward(dy)
    found = {"y": y, "x": x.grad, **gradients_of(held, model.parameters())}
    exact = {name: v.detach().double().requires_grad_() for name, v in held.items()}
    pairs: dict[str, Any] = {}
    for name in kernels:
        sides = [
            (exact[f"{name}, A of {f}"].unbind(), exact[f"{name}, B of {f}"].unbind()) for f in used
        ]
        pairs[name] = [
            {f: (a[e], b[e]) for f, (a, b) in zip(used, sides, strict=True)} for e in range(EXPERTS)
        ]
    far_x = x.detach().double().requires_grad_()
    call = partial(definition, module, far_x, index, weights.double(), pairs)
    scale = config.scale("layer", used[0])
    wanted = call(rows, scale)
    wanted.backward(dy.double())
    expected = {"y": wanted, "x": far_x.grad, **{name: v.grad for name, v in exact.items()}}
    far = {}
    for name, value in expected.items():
        got = found[name]
        assert got is not None and value is not None, f"no gradient of {name}"
        far[name] = distance(got, value.detach())
    worst = max(far, key=lambda name: far[name])
    least = distance(call([[] for _ in rows], scale).detach(), wanted.detach())
    record.put("experts differ from the definition by", {worst: far[worst], "base alone": least})
    assert far[worst] < 3e-2 < least / 3, f"{worst} is off by {far[worst]:.1e}, base {least:.1e}"


def arms_of(
    record: Record, clock: Clock, base: Any, inputs: dict[str, Any], features: tuple[int, ...]
) -> tuple[list[Arm], dict[str, dict[str, Any]]]:
    """The frozen model's step, PEFT's where it runs, and flix's with so many features; and the routing of flix's."""
    frozen = copy.deepcopy(base).train()
    frozen.get_input_embeddings().register_forward_hook(require_grad)
    arms = [training_arm(clock, FROZEN, frozen, inputs, [])]
    size = f"d = {base.config.hidden_size:,}"

    def peft() -> Arm:
        model = peft_model(base)
        own = [p for p in model.parameters() if p.requires_grad]
        arm = training_arm(clock, f"{PEFT}, bfloat16", model, inputs, own)
        arm.reset()
        arm.run()
        return arm

    made = record.attempt(f"PEFT's LoRA of experts, {size}", peft)
    arms += [] if made is None else [made]
    routings: dict[str, dict[str, Any]] = {}
    for count in features:

        def ours(count: int = count) -> Arm:
            model = flix_model(base, count)
            name, own = f"flix, {count:,} features", list(trainable_parameters(model))
            routings[name] = {"flix_features": draw_ids(count, len(inputs["input_ids"]), 12, 12)}
            return training_arm(clock, name, model, {**inputs, **routings[name]}, own)

        needs = 25.0 if count > 100 and not record.dry else 5.0
        made = record.attempt(f"flix, {count:,} features, {size}", ours, needs=needs)
        arms += [] if made is None else [made]
    return arms, routings


def forward_only(
    record: Record, clock: Clock, title: str, arms: list[Arm], calls: dict[str, Any], rounds: int
) -> None:
    """A table of forward passes without gradients."""

    def timed(arm: Arm) -> float:
        clock.sync()
        begin = clock.mark()
        with torch.no_grad():
            out = arm.model(**calls[arm.name]).logits
        end = clock.mark()
        clock.sync()
        assert bool(out.isfinite().all()), arm.name
        return clock.between(begin, end)

    times = clock.times(arms, rounds, timed)
    ratios = over(times, FROZEN)
    found = [[arm.name, figure(times[arm.name]), ratios[arm.name]] for arm in arms]
    record.table(Table(title, ["forward alone", "ms", "over frozen"], found))
    record.put(title, {row[0]: row[1:] for row in found})


def run(record: Record) -> None:
    """The section."""
    clock = Clock(record.dry)
    rows, length, rounds = (3, 4, 1) if record.dry else (16, 512, 8)
    guarded = partial(guard, record, clock, 128 if record.dry else 256, 4 if record.dry else 64)
    record.attempt("a module of experts beside the definition", guarded)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 1024, (rows, length), generator=generator).to(clock.device)
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
    few, many = (25, 40) if record.dry else (25, 1000)

    def steps(d: int, layers: int, features: tuple[int, ...], name: str) -> None:
        base = build(d, layers, clock.device)
        record.put("the base's own experts", getattr(base.config, "_experts_implementation", None))
        arms, routings = arms_of(record, clock, base, inputs, features)
        title = (
            f"{name}{EXPERTS} experts, {EACH} for each token, d = {d:,}, {layers} layer"
            f"{'s' if layers > 1 else ''}, bfloat16, {rows} x {length} tokens"
        )
        measure(record, clock, title, arms, rounds, rows * length)
        calls = {arm.name: {"input_ids": tokens, **routings.get(arm.name, {})} for arm in arms}
        forward_only(record, clock, f"Forward alone: {title}", arms, calls, rounds)

    for d in (128,) if record.dry else SIZES:
        name = f"experts, d = {d:,}"
        record.attempt(name, partial(steps, d, 2, (few,), ""), needs=8.0)
        if clock.cuda:
            torch.cuda.empty_cache()
    d = 128 if record.dry else 512
    call = partial(steps, d, 1, (few, many), "Growth with features: ")
    record.attempt("experts, registered features", call, needs=12.0)
