"""The fused kernels on the card, forward and backward, against the definition in float64.

The substance of tests/backends/torch/kernels/test_launch.py without pytest, and the sizes of real layers, which an
interpreter cannot reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flix
from benchmarks.common import Table
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.problem import dense, distance, draw_ids, flix_layer, pairs_of
from benchmarks.gpu.record import Record
from benchmarks.layer.problem import make_registry
from benchmarks.torch_gradients import pair_gradients
from flix.backends.torch import FlixLinear, adapt

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
REGISTRY = flix.FeatureRegistry({"language": ["hau", "swa", "yor", "zul"], "task": ["ner", "pos"]})
ROWS = [
    {"language": "hau", "task": "ner"},
    {"language": {"swa": 0.5, "yor": -1.5}, "task": "pos"},
    {"task": ["ner", "pos"]},
    {},
]
RANKS = {"language": {"hau": 1, "swa": 3, "yor": 0, "zul": 2}, "task": {"ner": 2, "pos": 4}}
CONFIG = flix.FlixConfig(registry=REGISTRY, ranks=RANKS, alpha={"task": 3.0})


@dataclass(frozen=True)
class Case:
    """A layer and a batch.

    Attributes:
        name: what it is about.
        shape: of x.
        d_out: output size.
        ids, weights: the routing.
        dtype: of x and the kernel.
        config: the features.
        bias: whether the layer has one.
        change: done to the layer before it runs.
        autocast: to a dtype, or None.
    """

    name: str
    shape: tuple[int, ...]
    d_out: int
    ids: Tensor
    weights: Tensor
    dtype: torch.dtype = torch.float32
    config: flix.FlixConfig = CONFIG
    bias: bool = True
    change: Callable[[FlixLinear], Any] | None = None
    autocast: torch.dtype | None = None


def encoded(rows: Sequence[Any] = ROWS) -> dict[str, Tensor]:
    """ids and weights of some rows."""
    routing = REGISTRY.encode(rows)
    return {"ids": torch.from_numpy(routing.ids), "weights": torch.from_numpy(routing.weights)}


def cases(dry: bool) -> list[Case]:
    """What is held to the definition: first what matters most."""
    found = []
    for dtype in (
        TOLERANCE
    ):  # unequal ranks, one of 0, padding, weights below 0, a row that activates nothing
        for shape in ((4, 24), (4, 1, 21), (4, 5, 24), (4, 69, 40), (4, 2, 3, 16)):
            name = f"shape {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
            found.append(Case(name, shape, 19, **encoded(), dtype=dtype))
    rng = np.random.default_rng(0)
    token = torch.from_numpy(rng.integers(-1, 6, (2, 9, 3)))
    factors = torch.from_numpy(rng.normal(size=token.shape).astype("f4"))
    per_token = Case("routing per token", (2, 9, 24), 19, token, factors)
    twice = {
        "ids": torch.tensor([[0, -1, 0, 5], [-1, 5, -1, 5]]),
        "weights": torch.tensor([[0.5, 9.0, -1.5, 1.0], [7.0, 0.0, 7.0, 2.0]]),
    }
    for length in (1, 6, 64):
        found.append(Case(f"a feature listed twice, length {length}", (2, length, 12), 10, **twice))
    for length in (3, 130):
        few = encoded(ROWS[:2])
        found.append(Case(f"several chunks, length {length}", (2, length, 530), 270, **few))
    slots = {
        "ids": torch.tensor([[0, 4], [5, 0]]),
        "weights": torch.tensor([[1.0, -0.5], [0.0, 2.0]]),
    }
    for rank in (18, 35):  # 36 slots fit one block; 70 need two
        config = flix.FlixConfig(registry=REGISTRY, ranks=rank)
        for length in (1, 7, 70):
            name = f"{2 * rank} slots, length {length}"
            found.append(Case(name, (2, length, 20), 33, **slots, config=config))
    one = {"ids": torch.tensor([[3, 5]]), "weights": torch.ones(1, 2)}
    found += [
        per_token,
        replace(per_token, name="routing per token, bfloat16", dtype=torch.bfloat16),
        Case("one row, no bias", (1, 17, 12), 9, **one, bias=False),
        Case(
            "pairs in half precision",
            (4, 8, 24),
            16,
            **encoded(),
            dtype=torch.float16,
            change=lambda layer: layer.half(),
        ),
        Case("autocast", (4, 8, 24), 19, **encoded(), autocast=torch.bfloat16),
    ]
    return [found[i] for i in (1, 3, 11, 14, 15, 21, 27)] if dry else found


def large(features: int, count: int, length: int, d: int, dtype: torch.dtype) -> Case:
    """A real layer's sizes."""
    ids = draw_ids(features, count, 12, 12)
    config = flix.FlixConfig(registry=make_registry(features), ranks=8)
    name = f"{features} features, {count} x {length}, d = {d}, {str(dtype).removeprefix('torch.')}"
    return Case(name, (count, length, d), d, ids, torch.ones(ids.shape), dtype, config)


def step(layer: FlixLinear, case: Case, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Everything a step gives: the output and all gradients."""
    x = x.clone().requires_grad_()
    weights = case.weights.to(x.device).clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=case.autocast, enabled=case.autocast is not None):
        y = layer(x, flix_features=case.ids, flix_weights=weights)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    gradients = pair_gradients(pairs_of(layer, case.config), layer.parameters())
    for name, value in gradients.items():
        found[name] = None if value is None else torch.from_numpy(value)
    return {name: value for name, value in found.items() if value is not None}


def layer_of(case: Case, strategy: str, device: str) -> FlixLinear:
    """The case's layer."""
    torch.manual_seed(0)
    base = nn.Linear(case.shape[-1], case.d_out, case.bias, device=device).to(case.dtype)
    base.requires_grad_(False)
    layer = flix_layer(base, case.config, strategy)
    if case.change is not None:
        case.change(layer)
    return layer


def errors(case: Case, clock: Clock, strategy: str = "fused") -> dict[str, float]:
    """How far a strategy is from the definition, by result; a missing or superfluous gradient is infinitely far."""
    torch.manual_seed(1)
    x = torch.randn(case.shape, device=clock.device).to(case.dtype)
    dy = torch.randn(*case.shape[:-1], case.d_out, device=clock.device).to(case.dtype)
    layer = layer_of(case, strategy, clock.device)
    found = step(layer, case, x, dy)
    rows = case.ids.reshape(-1, case.ids.shape[-1])
    lead = (rows.shape[0], -1)
    expected = dense(
        x.reshape(*lead, case.shape[-1]),
        dy.reshape(*lead, case.d_out),
        layer.weight,
        layer.bias,
        pairs_of(layer, case.config),
        case.config,
        rows,
        case.weights.reshape(rows.shape),
    )
    far = {name: float("inf") for name in found.keys() ^ expected.keys()}
    for name in found.keys() & expected.keys():
        far[name] = distance(found[name].reshape(expected[name].shape), expected[name])
    return far


def check(case: Case, clock: Clock) -> float:
    """The largest error of a case.

    Raises:
        AssertionError: it is above what the dtype allows.
    """
    far = errors(case, clock)
    allowed = TOLERANCE[case.autocast or case.dtype]
    worst = max(far, key=lambda name: far[name])
    if not far[worst] <= allowed:
        plain = errors(case, clock, "gather").get(worst)
        raise AssertionError(
            f"{worst} is off by {far[worst]:.1e} where {allowed:.0e} is allowed; gather's by {plain:.1e}"
        )
    return far[worst]


def same_bits(clock: Clock) -> float:
    """Two runs give the same bits."""
    ids = torch.tensor([[4, 0], [4, 1], [4, 0]])
    for length in (1, 40, 100):
        case = Case("", (3, length, 48), 33, ids, torch.ones(3, 2))
        layer = layer_of(case, "fused", clock.device)
        x, dy = (torch.randn(3, length, d, device=clock.device) for d in (48, 33))
        first, second = (
            {n: v.clone() for n, v in step_of(layer, case, x, dy).items()} for _ in range(2)
        )
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} differs at length {length}"
    return 0.0


def step_of(layer: FlixLinear, case: Case, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """A step from no gradients."""
    layer.zero_grad(set_to_none=True)
    return step(layer, case, x, dy)


def absent(clock: Clock) -> float:
    """Features that no row uses get no gradient."""
    rows = encoded([{"language": "hau", "task": "ner"}] * 4)
    case = Case("", (4, 6, 12), 9, **rows)
    layer = layer_of(case, "fused", clock.device)
    x, dy = (torch.randn(4, 6, d, device=clock.device) for d in (12, 9))
    found = {name for name in step(layer, case, x, dy) if name[:2] in ("A ", "B ")}
    wanted = {f"{s} {f}" for s in "AB" for f in (("language", "hau"), ("task", "ner"))}
    assert found == wanted, f"gradients of {found}"
    return 0.0


def empty(clock: Clock) -> float:
    """Inputs without rows or positions."""
    routing = encoded()
    for shape in ((0, 3, 12), (4, 0, 12)):
        rows = {name: value[: shape[0]] for name, value in routing.items()}
        case = Case("", shape, 9, **rows)
        layer = layer_of(case, "fused", clock.device)
        x, dy = (torch.zeros(*shape[:2], d, device=clock.device) for d in (12, 9))
        found = step(layer, case, x, dy)
        assert found["y"].shape == (*shape[:2], 9) and found["x"].shape == shape
    return 0.0


def checkpointing(clock: Clock) -> float:
    """Both modes of activation checkpointing give the plain gradients."""
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self, mode: bool | None) -> None:
            super().__init__()
            self.layer, self.mode = nn.Linear(12, 9), mode

        def forward(self, x: Tensor) -> Tensor:
            if self.mode is None:
                return self.layer(x)
            return checkpoint(self.layer, x, use_reentrant=self.mode)  # type: ignore[no-any-return]

    case, found = Case("", (), 0, **encoded()), []
    for mode in (None, True, False):
        torch.manual_seed(0)
        model = adapt(Net(mode), case.config, strategy="fused").to(clock.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(std=0.1, generator=_generator(clock))
        x = torch.ones(4, 6, 12, device=clock.device, requires_grad=True)
        model(x, flix_features=case.ids, flix_weights=case.weights).sum().backward()
        found.append([p.grad for p in trained if p.grad is not None])
    for other in found[1:]:
        assert len(other) == len(found[0]), "other parameters have gradients"
    return max(distance(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def transposed(clock: Clock) -> float:
    """A kernel that is stored ``[d_in, d_out]`` gives what the same kernel gives as a linear layer's."""
    from transformers.pytorch_utils import Conv1D

    routing, found = encoded(), []
    for cls in (nn.Linear, Conv1D):
        torch.manual_seed(0)
        weight, bias = torch.randn(9, 12), torch.randn(9)
        base = nn.Linear(12, 9) if cls is nn.Linear else Conv1D(9, 12)
        with torch.no_grad():
            base.weight.copy_(weight if cls is nn.Linear else weight.t())
            base.bias.copy_(bias)
        model = adapt(nn.Sequential(base), CONFIG, strategy="fused").to(clock.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(std=0.3, generator=_generator(clock))
        x = torch.randn(4, 6, 12, device=clock.device, generator=_generator(clock))
        x.requires_grad_()
        y = model(x, flix_features=routing["ids"], flix_weights=routing["weights"])
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in trained if p.grad is not None)])
    worst = max(distance(a, b) for a, b in zip(*found, strict=True))
    assert worst < 1e-5, f"off by {worst:.1e}"
    return worst


def _generator(clock: Clock) -> torch.Generator:
    return torch.Generator(clock.device).manual_seed(0)


def compiled(clock: Clock, backend: str) -> float:
    """A whole compiled graph gives the eager output and gradient of x, without a new graph as features change."""
    torch._dynamo.reset()
    case, worst = Case("", (), 0, **encoded()), 0.0
    model = adapt(nn.Sequential(nn.Linear(24, 19)), case.config, strategy="fused")
    model = model.to(clock.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.3, generator=_generator(clock))
    fast = torch.compile(model, fullgraph=True, backend=backend)
    for shift in range(3):
        routing = encoded((ROWS * 2)[shift : shift + 4])
        ids, weights = (routing[name].to(clock.device) for name in ("ids", "weights"))
        found = []
        with torch._dynamo.config.patch(error_on_recompile=shift > 0):
            for call in (fast, model):
                model.zero_grad(set_to_none=True)
                x = torch.randn(4, 9, 24, device=clock.device, generator=_generator(clock))
                x.requires_grad_()
                y = call(x, flix_features=ids, flix_weights=weights)
                y.sum().backward()
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
                found.append([y.detach(), x.grad, *grads])
        worst = max(worst, *(distance(a, b) for a, b in zip(*found, strict=True)))
    assert worst < 1e-5, f"off by {worst:.1e}"
    with torch.no_grad():
        y = fast(x.detach()[:3], flix_features=torch.tensor([[0, 1], [0, 9], [-1, -1]]))
    poisoned = y.isnan().flatten(1).all(1).tolist()
    assert poisoned == [False, True, False], f"rows of NaN for an id of no feature: {poisoned}"
    return worst


def run(record: Record) -> None:
    """The section."""
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(record.dry)
    sizes = [(16, 512, 4096), (64, 1, 4096)]
    if record.dry:
        sizes = [(2, 16, 32)]
    todo: list[tuple[str, Callable[[], float]]] = []
    for features in (25, 1000):
        for count, length, d in sizes:
            for dtype in (torch.bfloat16, torch.float32):
                case = large(features, count, length, d, dtype)
                todo.append((case.name, lambda case=case: check(case, clock)))
    if record.dry:
        todo = todo[:1]
    todo += [
        ("two runs give the same bits", lambda: same_bits(clock)),
        ("absent features have no gradient", lambda: absent(clock)),
        ("empty inputs", lambda: empty(clock)),
        ("a kernel of [d_in, d_out]", lambda: transposed(clock)),
        ("activation checkpointing", lambda: checkpointing(clock)),
        ("compiled, aot_eager", lambda: compiled(clock, "aot_eager")),
    ]
    todo += [(case.name, lambda case=case: check(case, clock)) for case in cases(record.dry)]
    if not record.dry:
        todo.append(("compiled, inductor", lambda: compiled(clock, "inductor")))
    passed: dict[str, float] = {}
    for name, call in todo:
        worst = record.attempt(name, call)
        if worst is not None:
            passed[name] = worst
            record.put(f"{name}, largest error", worst)
    failed = list(record.data["errors"])
    record.put("passed", len(passed))
    record.put("failed", failed)
    rows = [[name, f"{passed[name]:.1e}" if name in passed else "**failed**"] for name, _ in todo]
    rows = [row for row in rows if row[0] not in record.data["skipped"]]
    record.table(
        Table(
            "The fused kernels against the definition in float64",
            ["case", "largest relative error of output and gradients"],
            rows,
            f"{len(passed)} passed, {len(failed)} failed, {len(record.data['skipped'])} not reached.",
        )
    )
