"""Layers, peers and batches on a CUDA device, and the definition in float64.

All that the GPU benchmarks take from flix stands here and in ``pallas``; public names, but for the attribute that
holds a layer's strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flix
from benchmarks.common import Arm, Results
from benchmarks.layer.problem import ACTIVE, RANK, Feature
from flix.backends.torch import FlixLinear, route

LORA_RANK = ACTIVE * RANK
FROZEN, LORA = "frozen layer", f"one LoRA of rank {LORA_RANK}, by hand"
PEFT = f"PEFT, one LoRA of rank {LORA_RANK}"


def draw_ids(features: int, rows: int, languages: int, tasks: int, seed: int = 0) -> Tensor:
    """One language and one task a row ``[rows, 2]``, of the first so many of each."""
    rng = np.random.default_rng(seed)
    first = features - features // 2
    drawn = [rng.integers(0, languages, rows), first + rng.integers(0, tasks, rows)]
    return torch.from_numpy(np.stack(drawn, 1).astype(np.int32))


def set_strategy(model: nn.Module, strategy: str) -> None:
    """Let every adapted layer of a model compute by this strategy, quantised ones too."""
    for module in model.modules():
        if isinstance(getattr(module, "flix_strategy", None), str):
            module.flix_strategy = strategy  # type: ignore[assignment]


def flix_layer(base: nn.Linear, config: flix.FlixConfig, strategy: str) -> FlixLinear:
    """A layer over a frozen one's kernel, with pairs that are neither zero nor large."""
    d_out, d_in = base.weight.shape
    kind: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
    bias = base.bias is not None
    layer = FlixLinear(d_in, d_out, bias, config=config, name="layer", strategy=strategy, **kind)
    layer.weight, layer.bias = base.weight, base.bias
    generator = torch.Generator(base.weight.device).manual_seed(1)
    with torch.no_grad():
        for feature in config.registry.features:
            if rank := config.rank("layer", feature):
                layer.flix_A[feature].normal_(std=d_in**-0.5, generator=generator)
                layer.flix_B[feature].normal_(std=0.5 * rank**-0.5, generator=generator)
    return layer


def pairs_of(layer: FlixLinear, config: flix.FlixConfig) -> dict[str, Tensor]:
    """The layer's pairs as ``A <feature>`` and ``B <feature>``."""
    found = {}
    for feature in config.registry.features:
        if config.rank("layer", feature):
            found[f"A {feature}"] = layer.flix_A[feature]
            found[f"B {feature}"] = layer.flix_B[feature]
    return found


class Lora(nn.Module):
    """One LoRA for all rows, written by hand: the least that one costs in eager torch.

    Args:
        base: the frozen layer.
        rank: of the LoRA.
    """

    def __init__(self, base: nn.Linear, rank: int = LORA_RANK) -> None:
        super().__init__()
        self.base = base
        d_out, d_in = base.weight.shape
        kind: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.a = nn.Parameter(torch.randn(rank, d_in, **kind) * d_in**-0.5)
        self.b = nn.Parameter(torch.randn(d_out, rank, **kind) * rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.t()) @ self.b.t()


def peft_layer(base: nn.Linear, half: bool) -> nn.Module:
    """PEFT's LoRA for all rows over the same kernel.

    Args:
        base: the frozen layer.
        half: in the base's dtype; PEFT's default is float32.

    Raises:
        ImportError: PEFT is not installed.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["0"], init_lora_weights=False
    )
    device = base.weight.device
    model = get_peft_model(nn.Sequential(base), settings, autocast_adapter_dtype=not half)
    return model.to(device)  # type: ignore[no-any-return]


def layer_arm(
    name: str,
    layer: nn.Module,
    x: Tensor,
    dy: Tensor | None,
    routing: tuple[flix.FeatureRegistry, Tensor] | None = None,
) -> Arm:
    """A layer's run: forward and backward to x and the adapter, or the forward alone where ``dy`` is None.

    A batch's routing is in force before, as it is for all layers of a model but the first.
    """

    def run() -> Tensor:
        if dy is None:
            with torch.no_grad():
                return layer(x)
        y = layer(x)
        y.backward(dy)
        return y

    used: list[nn.Parameter] = []

    def reset() -> None:
        x.grad = None
        if not used:  # the others get no gradient
            used.extend(p for p in layer.parameters() if p.grad is not None)
        for parameter in used:
            parameter.grad = None

    @contextmanager
    def routed(registry: flix.FeatureRegistry, ids: Tensor) -> Iterator[None]:
        with route(registry, ids):
            with torch.no_grad():
                layer(x)
            yield

    def results(y: Tensor) -> Results:
        return {"y": y.detach(), "dx": x.grad}

    around: Any = nullcontext if routing is None else partial(routed, *routing)
    return Arm(name, run, results, reset, layer, around)


def dense(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Mapping[str, Tensor],
    config: flix.FlixConfig,
    ids: Tensor,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output and gradients from the definition, in float64, row by row.

    Args:
        x: ``[N, S, d_in]``.
        dy: ``[N, S, d_out]``.
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]`` or None.
        pairs: of :func:`pairs_of`.
        config: for the scales.
        ids: ``[N, W]``.
        weights: ``[N, W]`` or None for 1.

    Returns:
        ``y``, ``x``, ``weights``, and ``A <feature>``, ``B <feature>`` of every feature that a row uses.
    """
    features: Sequence[Feature] = config.registry.features
    x, dy, kernel = x.detach().double(), dy.double(), weight.detach().double()
    y, dx = x @ kernel.t(), dy @ kernel
    if bias is not None:
        y = y + bias.detach().double()
    factors = torch.ones(ids.shape) if weights is None else weights.detach().double().cpu()
    d_weights = torch.zeros(ids.shape, dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for n, row in enumerate(ids.tolist()):
        for w, i in enumerate(row):
            if i < 0 or f"A {features[i]}" not in pairs:
                continue
            a, b = (pairs[f"{side} {features[i]}"].detach().double() for side in "AB")
            scale = config.scale("layer", features[i])
            factor = float(factors[n, w]) * scale
            h, dh = x[n] @ a.t(), dy[n] @ b
            y[n] += factor * (h @ b.t())
            dx[n] += factor * (dh @ a)
            d_weights[n, w] = scale * float((h * dh).sum())
            for name, part in (("A", dh.t() @ x[n]), ("B", dy[n].t() @ h)):
                key = f"{name} {features[i]}"
                found[key] = found.get(key, 0) + factor * part
    return {"y": y, "x": dx, "weights": d_weights, **found}


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected; infinite where something is not finite."""
    expected = expected.double()
    found = found.detach().to(expected.device).double()
    if not bool(found.isfinite().all()):
        return float("inf")
    size = float(expected.norm())
    return float((found - expected).norm()) / max(size, 1e-30)
