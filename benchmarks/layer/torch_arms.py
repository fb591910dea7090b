"""The candidates of a torch layer: the frozen layer, PEFT's ways to route rows, and flix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Arm, Results
from benchmarks.layer.problem import Feature, Problem
from benchmarks.torch_gradients import pair_gradients
from flix.backends.torch import FlixLinear, route

Forward = Callable[[Tensor], Tensor]
Gradients = Callable[[], Results]


def _numpy(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()


def _base(problem: Problem) -> nn.Linear:
    layer = nn.Linear(problem.d, problem.d)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(problem.weight))
        layer.bias.copy_(torch.from_numpy(problem.bias))
    return layer.requires_grad_(False)


def make_arm(
    name: str,
    problem: Problem,
    layer: nn.Module,
    forward: Forward,
    gradients: Gradients,
    backward: bool,
) -> Arm:
    """An arm out of a layer's forward.

    Args:
        name: the arm's.
        problem: its arrays.
        layer: what is trained.
        forward: x to y.
        gradients: reads the gradients of the parameters, by name.
        backward: forward and backward, or the forward alone and without autograd.
    """
    x = torch.from_numpy(problem.x).clone().requires_grad_(backward)
    dy = torch.from_numpy(problem.dy)

    def run() -> Tensor:
        if not backward:
            with torch.no_grad():
                return forward(x)
        y = forward(x)
        y.backward(dy)
        return y

    def results(y: Tensor) -> Results:
        if not backward:
            return {"y": _numpy(y)}
        return {"y": _numpy(y), "dx": _numpy(x.grad), **gradients()}

    def reset() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return Arm(name, run, results, reset, layer)


def frozen_arm(problem: Problem, backward: bool = True) -> Arm:
    """The frozen layer; its backward is the gradient of x alone."""
    layer = _base(problem)
    return make_arm("frozen layer", problem, layer, layer, dict, backward)


def flix_arm(
    name: str,
    problem: Problem,
    strategy: str = "auto",
    backward: bool = True,
    later: bool = False,
) -> Arm:
    """flix. A batch's routing is placed once a step for all layers: by this layer, or (later) by one before it."""
    d = problem.d
    layer = FlixLinear(d, d, config=problem.config, strategy=strategy)
    base = _base(problem)
    layer.weight, layer.bias = base.weight, base.bias
    with torch.no_grad():
        for feature, pair in problem.pairs.items():
            layer.flix_A[feature].copy_(torch.from_numpy(pair.a))
            layer.flix_B[feature].copy_(torch.from_numpy(pair.b))
    ids = torch.from_numpy(problem.ids)

    def routed(x: Tensor) -> Tensor:
        with route(problem.registry, ids):
            return layer(x)

    first = FlixLinear(1, 1, config=problem.config)

    @contextmanager
    def placed_before() -> Iterator[None]:
        with route(problem.registry, ids):
            first(torch.zeros(len(ids), 1, 1))
            yield

    def gradients() -> Results:
        features = problem.registry.features
        pairs = {f"dA {f}": layer.flix_A[f] for f in features}
        pairs |= {f"dB {f}": layer.flix_B[f] for f in features}
        return pair_gradients(pairs, layer.parameters())

    arm = make_arm(name, problem, layer, layer if later else routed, gradients, backward)
    if later:
        arm.around = placed_before
    return arm


def unused_gradients(arm: Arm, problem: Problem) -> list[str]:
    """Names of the gradients that the arm must not compute: those of features that no row uses."""
    return [
        f"d{which} {feature}"
        for feature in problem.registry.features
        if feature not in problem.pairs
        for which in "AB"
    ]


def _peft(problem: Problem, adapters: list[str], rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        return LoraConfig(
            r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False, lora_dropout=0.0
        )

    model = get_peft_model(nn.Sequential(_base(problem)), config(), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config())
    return model


def _adapter(feature: Feature) -> str:
    return "-".join(feature)


def _peft_of_features(problem: Problem) -> tuple[Any, Any, Gradients]:
    """PEFT with one adapter for each feature that rows use: the model, its layer, its gradients."""
    model = _peft(problem, [_adapter(f) for f in problem.pairs], problem.rank)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for feature, pair in problem.pairs.items():
            layer.lora_A[_adapter(feature)].weight.copy_(torch.from_numpy(pair.a))
            layer.lora_B[_adapter(feature)].weight.copy_(torch.from_numpy(pair.b))

    def gradients() -> Results:
        found = {}
        for feature in problem.pairs:
            found[f"dA {feature}"] = _numpy(layer.lora_A[_adapter(feature)].weight.grad)
            found[f"dB {feature}"] = _numpy(layer.lora_B[_adapter(feature)].weight.grad)
        return found

    return model, layer, gradients


def peft_single_arm(problem: Problem, rank: int, backward: bool = True) -> Arm:
    """One LoRA of this rank for all rows: it does not route, and is here for its arithmetic."""
    model = _peft(problem, ["default"], rank)
    layer = model.base_model.model[0]

    def gradients() -> Results:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return {"dA": _numpy(a.grad), "dB": _numpy(b.grad)}

    name = f"PEFT, one LoRA of rank {rank} for all rows"
    return make_arm(name, problem, model, model, gradients, backward)


def peft_loop_arm(problem: Problem, backward_each: bool = True) -> Arm:
    """A loop over the batch's compositions, each with its own backward.

    The rows are split before the clock starts.

    Args:
        problem: the problem.
        backward_each: False calls backward once, at the end: PEFT then drops the gradients of the adapters that are
            inactive by that time. It is here for the test that the guard sees it.
    """
    model, _, gradients = _peft_of_features(problem)
    groups: dict[tuple[Feature, ...], list[int]] = {}
    for n, row in enumerate(problem.rows):
        groups.setdefault(tuple(row), []).append(n)
    x, dy = torch.from_numpy(problem.x), torch.from_numpy(problem.dy)
    parts = [
        ([_adapter(f) for f in row], x[numbers].clone().requires_grad_(True), dy[numbers])
        for row, numbers in groups.items()
    ]

    def run() -> list[Tensor]:
        made = []
        for names, part, cotangent in parts:
            model.base_model.set_adapter(names)
            y = model(part)
            if backward_each:
                y.backward(cotangent)
            made.append(y)
        if not backward_each:
            torch.autograd.backward(made, [cotangent for *_, cotangent in parts])
        return made

    def results(made: list[Tensor]) -> Results:
        y, dx = torch.empty_like(x), torch.empty_like(x)
        for numbers, (_, part, _), out in zip(groups.values(), parts, made, strict=True):
            y[numbers] = out.detach()
            if part.grad is not None:
                dx[numbers] = part.grad
        return {"y": _numpy(y), "dx": _numpy(dx), **gradients()}

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        for _, part, _ in parts:
            part.grad = None

    return Arm("PEFT, loop over the batch's compositions", run, results, reset, model)


def peft_names_arm(problem: Problem, backward: bool = True) -> Arm:
    """``adapter_names``, which takes one adapter a row: a pass for each of the two, less the base that both hold.

    PEFT refuses it in training; in evaluation mode its gradients are exact.
    """
    model, layer, gradients = _peft_of_features(problem)
    model.eval()
    for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
        parameter.requires_grad_(True)
    columns = [list(map(_adapter, column)) for column in zip(*problem.rows, strict=True)]

    def forward(x: Tensor) -> Tensor:
        first, *others = (model(x, adapter_names=names) for names in columns)
        base = layer.base_layer(x)
        for y in others:
            first = first + (y - base)
        return first

    name = f"PEFT `adapter_names`, {len(columns)} passes"
    return make_arm(name, problem, model, forward, gradients, backward)
