"""The example backend with mixtures of experts, for the mutants of :mod:`mutants.experts`."""

from __future__ import annotations

from typing import Any

import numpy as np
from flix_numpy import Layer, Model
from flix_numpy.conformance import AdamW

from flix.core.adapter.adapter import LayerShape
from mutants._registry import OPTIONAL, OptionalHarness, OptionalPrimitives


class Kernel(Layer):
    """A kernel ``[E, d_in, d_out]``; each of its experts is the example's layer."""

    single = Layer

    def __init__(self, path: str, kernel: Any) -> None:
        super().__init__(path, kernel[0])
        self.kernel = kernel
        self.shape = LayerShape(*kernel.shape[1:], "linear", len(kernel), 2)

    def one(self, number: int) -> Layer:
        """An expert by itself."""
        layer = self.single(self.path, self.kernel[number])
        layer.state = self.state
        layer.pairs = {f: [part[number] for part in pair] for f, pair in self.pairs.items()}
        return layer


class Moe(Model):
    """Two kernels, and what stands between them."""

    def __init__(self, experts: Any, kernel: type[Kernel] = Kernel) -> None:
        kernels = {"up": experts.up, "down": experts.down}
        held = {f"{experts.path}.{name}": kernel(f"{experts.path}.{name}", k.astype(experts.dtype)) for name, k in kernels.items()}  # fmt: skip
        super().__init__(held)
        self.experts = experts

    def shares(self, x: Any) -> Any:
        """Of every expert at every position, ``[..., E]``."""
        e, lead = self.experts, x.shape[:-1]
        table = np.zeros((len(e.sent), len(e.up)), x.dtype)
        np.put_along_axis(table, e.sent, e.share.astype(x.dtype), 1)
        return table[np.arange(int(np.prod(lead))) % len(table)].reshape(*lead, -1)

    def parts(self, x: Any, ids: Any, weights: Any) -> Any:
        """Of each expert: its kernels, its share, what comes before and after the gate, and the gate's slope."""
        up, down = self.values()
        shares = self.shares(x)
        for number in range(len(up.kernel)):
            before = up.one(number)
            g, u = np.split(before(x, ids, weights), 2, -1)
            gate = 1 / (1 + np.exp(-g))
            slope = gate * (1 + g * (1 - gate))
            yield before, down.one(number), shares[..., number, None], g * gate, u, slope

    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if self.state is None and ids is not None:
            return super().__call__(x, ids, weights)  # refuses
        parts, later = self.parts(x, ids, weights), self.later(ids)
        return sum(share * after(g * u, later, weights) for _, after, share, g, u, _ in parts)

    def later(self, ids: Any) -> Any:
        """The ids after the gate."""
        return ids

    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        """Gradients of x, the weights, and both kernels' pairs."""
        dx, d_weights = np.zeros(x.shape), np.zeros(ids.shape)
        pairs: list[dict[Any, list[Any]]] = [
            {f: [np.zeros(p.shape, p.dtype) for p in pair] for f, pair in kernel.pairs.items()}
            for kernel in self.values()
        ]
        listed = {self.state.config.registry.features[i] for i in np.unique(ids[ids >= 0])}
        for number, (before, after, share, g, u, slope) in enumerate(self.parts(x, ids, weights)):
            d, w, downs = after.backward(g * u, ids, weights, share * dy)
            d_weights += w
            d = np.concatenate([d * u * slope, d * g], -1)
            d, w, ups = before.backward(x, ids, weights, d)
            dx, d_weights = dx + d, d_weights + w
            for side, own in enumerate((ups, downs)):
                for feature, gradient in own.items():
                    for part in (0, 1):
                        pairs[side][feature][part][number] = gradient[part]
        found = [{f: pair for f, pair in side.items() if f in listed} for side in pairs]
        return dx, d_weights, dict(zip(self, found, strict=True))


class Primitives(OptionalPrimitives):
    """The example's, for mixtures too."""

    def merged(self, model: Any, active: Any, update: Any) -> Any:
        if not isinstance(model, Moe):
            return super().merged(model, active, update)
        plain = Moe(model.experts, type(next(iter(model.values()))))
        for path, kernel in model.items():
            plain[path].kernel = kernel.kernel + self.turned(update(path)).astype(kernel.dtype)
        plain.held = active
        return plain

    def turned(self, update: Any) -> Any:
        return np.swapaxes(update, 1, 2)


class Harness(OptionalHarness):
    """The example's, with mixtures of experts."""

    kernel_of, model_of = Kernel, Moe

    def experts(self, experts: Any, x: Any) -> Any:
        return self.model_of(experts, self.kernel_of), *(f"{experts.path}.{n}" for n in ("up", "down"))  # fmt: skip

    def gradients(self, model: Any, batch: Any, dy: Any) -> Any:
        if not isinstance(model, Moe):
            return super().gradients(model, batch, dy)
        weights = np.ones(batch.ids.shape) if batch.weights is None else batch.weights
        dx, d_weights, pairs = model.backward(batch.x, batch.ids, weights, dy)
        return {"x": dx, "weights": d_weights, "pairs": pairs}

    def trainer(self, model: Any, settings: Any) -> Any:
        if not isinstance(model, Moe):
            return super().trainer(model, settings)
        optimizers = {path: AdamW(kernel, settings) for path, kernel in model.items()}

        def step(batch: Any) -> None:
            dy = (self.call(model, batch)[0] - batch.target) / len(batch.x)
            pairs = self.gradients(model, batch, dy)["pairs"]
            for path, optimizer in optimizers.items():
                optimizer.step({f: [np.float32(g) for g in p] for f, p in pairs[path].items()})

        return step


OPTIONAL["experts"] = (Primitives, Harness)
