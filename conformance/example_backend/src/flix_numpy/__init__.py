"""A backend of flix in plain numpy: a routed layer, its gradients, AdamW, merging, files, features that join and leave,
and a conformance harness."""

from __future__ import annotations

from typing import Any

import numpy as np

import flix
from flix.core.adapter.adapter import LayerShape, tensor_name
from flix.core.adapter.changes import plan_growth
from flix.core.adapter.compatibility import check_fits
from flix.core.adapter.composition import composition, delta
from flix.core.adapter.initial import initial_a, initial_b
from flix.core.adapter.lowrank import resized_mean
from flix.core.features.routing import check_routing


class Layer:
    """y = x W0 + b + Σ_f w_ef s_f B_f (A_f x), or the same with token ids for x (kind "embedding")."""

    def __init__(self, config: Any, path: str, kernel: Any, bias: Any, kind: str) -> None:
        self.config, self.path, self.kernel, self.bias = config, path, kernel, bias
        self.shape = LayerShape(*kernel.shape, kind)
        self.pairs = {f: self.fresh(f) for f in config.registry.features if config.rank(path, f)}
        self.moments: dict[Any, Any] = {}
        self.frozen: set[tuple[str, str]] = set()

    def fresh(self, feature: tuple[str, str]) -> list[Any]:
        """Initial A and B."""
        key = {"layer": self.path, "group": feature[0], "feature": feature[1]}
        rank, seed = self.config.rank(self.path, feature), self.config.seed
        a = initial_a(seed=seed, **key, rank=rank, d_in=self.shape.d_in)
        return [a, initial_b(rank=rank, d_out=self.shape.d_out)]

    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        """(feature, s_f, A, B, which slots list it, its factor for every position) of each feature in the batch."""
        trailing = x.ndim - (self.shape.kind == "linear") - (ids.ndim - 1)
        for number in np.unique(ids[ids >= 0]):
            feature = self.config.registry.features[number]
            if feature not in self.pairs:
                continue
            s, listed = self.config.scale(self.path, feature), ids == number
            acting = np.where(listed, 1.0 if weights is None else weights, 0.0)
            factor = s * acting.sum(-1, dtype=np.float64)
            factor = factor.reshape(*factor.shape, *[1] * (trailing + 1)).astype(self.kernel.dtype)
            a, b = (part.astype(self.kernel.dtype) for part in self.pairs[feature])
            yield feature, s, a, b, listed, factor

    def down(self, x: Any, a: Any) -> Any:
        """A x; of tokens, their columns of A."""
        return a.T[x] if self.shape.kind == "embedding" else x @ a.T

    def forward(self, x: Any, ids: Any, weights: Any = None) -> Any:
        """The output; refuses routing that breaks a rule."""
        check_routing(ids, weights, self.config.registry, batch=len(x))
        y = self.down(x, self.kernel.T) + (0 if self.bias is None else self.bias)
        for _, _, a, b, _, factor in self.active(x, ids, weights):
            y = y + factor * (self.down(x, a) @ b.T)
        return y

    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> dict[str, Any]:
        """Gradients of Σ y · dy."""
        tokens = self.shape.kind == "embedding"
        dx, flat_dy = None if tokens else dy @ self.kernel.T, dy.reshape(-1, dy.shape[-1])
        d_weights, pairs = np.zeros(ids.shape), {}
        for feature, s, a, b, listed, factor in self.active(x, ids, weights):
            h, dh = self.down(x, a), dy @ b
            per_row = (h * dh).sum(axis=tuple(range(ids.ndim - 1, h.ndim)))
            d_weights += listed * (s * per_row)[..., None]
            flat_dh = (factor * dh).reshape(-1, len(a))
            if tokens:
                da = np.zeros_like(a)
                np.add.at(da.T, x.ravel(), flat_dh)
            else:
                da = flat_dh.T @ x.reshape(-1, x.shape[-1])
                dx = dx + factor * (dh @ a)
            pairs[feature] = (da, flat_dy.T @ (factor * h).reshape(-1, len(a)))
        d_weights = None if weights is None else d_weights
        return {"x": dx, "weights": d_weights, "pairs": pairs, "base": None}

    def adamw(self, gradients: dict[Any, Any], s: Any) -> None:
        """One step on the features that have gradients; a feature's steps are counted by itself."""
        for feature, pair in gradients.items():
            if feature in self.frozen:
                continue
            for part, g in enumerate(pair):
                m, v, t = self.moments.get((feature, part), (0, 0, 0))
                m = s.beta1 * m + (1 - s.beta1) * g
                v = s.beta2 * v + (1 - s.beta2) * g * g
                t += 1
                self.moments[feature, part] = m, v, t
                step = m / (1 - s.beta1**t) / (np.sqrt(v / (1 - s.beta2**t)) + s.eps)
                p = self.pairs[feature][part]
                self.pairs[feature][part] = (p - s.lr * (step + s.decay * p)).astype(p.dtype)

    def to_adapter(self) -> flix.Adapter:
        """The layer's features as data."""
        named = {}
        for feature, pair in self.pairs.items():
            for part, value in zip("AB", pair, strict=True):
                named[tensor_name(self.path, part, feature)] = value
        return flix.Adapter(self.config, {self.path: self.shape}, named)

    def load(self, adapter: flix.Adapter) -> None:
        """Take configuration and values from an adapter for a layer like this."""
        check_fits(adapter, {self.path: self.shape})
        self.config = adapter.config
        ranked = [f for f in self.config.registry.features if self.config.rank(self.path, f)]
        self.pairs = {f: list(adapter.pair(self.path, f)) for f in ranked}

    def add(self, group: str, name: str, rank: int, init_from: Any) -> None:
        """A feature more, perhaps near to the mean of others; the others train no more."""
        growth = plan_growth(self.config, group, name, rank, init_from=init_from)
        self.config, self.frozen = growth.config, set(self.pairs)
        new, known = self.fresh(growth.feature), [f for f in growth.origins if f in self.pairs]
        if known:
            sources = [[p.astype(np.float64) for p in self.pairs[f]] for f in known]
            scales = [self.config.scale(self.path, f) for f in (*known, growth.feature)]
            new = resized_mean(sources, scales[:-1], new[0], scales[-1], len(growth.origins))
        self.pairs[growth.feature] = [p.astype(self.kernel.dtype) for p in new]

    def remove(self, group: str, name: str) -> None:
        """A feature less; its id stays reserved."""
        self.load(flix.remove_feature(self.to_adapter(), group, name))
        self.moments = {k: m for k, m in self.moments.items() if k[0] in self.pairs}

    def rename(self, group: str, name: str, new: str) -> None:
        """Another name for a feature, with all that is known of it."""
        self.load(flix.rename_feature(self.to_adapter(), group, name, new))
        names = {(group, name): (group, new)}
        self.moments = {(names.get(f, f), part): m for (f, part), m in self.moments.items()}
        self.frozen = {names.get(f, f) for f in self.frozen}

    def merged(self, row: Any) -> Any:
        """The kernel with one composition folded in."""
        update = delta(self.to_adapter(), self.path, composition(self.config, row))
        return (self.kernel + update.T).astype(self.kernel.dtype)


class Harness:
    """What the conformance kit runs."""

    dtypes, strategies, kinds = ("float32", "float64"), ("auto",), ("linear", "embedding")
    layer = Layer

    def plain(self, case: Any) -> Layer:
        """The case's layer with initial values."""
        kernel = case.kernel.astype(case.dtype)
        return self.layer(case.config, case.path, kernel, case.bias, case.kind)

    def adapted(self, case: Any) -> Layer:
        """The case's own model, or its layer with its values."""
        if case.model is not None:
            return case.model
        layer = self.plain(case)
        layer.pairs = {f: list(pair) for f, pair in case.pairs.items()}
        return layer

    def forward(self, case: Any) -> Any:
        y = self.adapted(case).forward(case.x, case.ids, case.weights)
        return y, y.dtype.name

    def gradients(self, case: Any, dy: Any) -> Any:
        return self.adapted(case).backward(case.x, case.ids, case.weights, dy)

    def train(self, case: Any, batches: Any, optimizer: Any) -> Any:
        layer, trajectory = self.adapted(case), []
        for batch in batches:
            dy = (layer.forward(batch.x, batch.ids, batch.weights) - batch.target) / len(batch.x)
            layer.adamw(layer.backward(batch.x, batch.ids, batch.weights, dy)["pairs"], optimizer)
            trajectory.append({f: tuple(pair) for f, pair in layer.pairs.items()})
        return {"pairs": trajectory, "base": layer.kernel}

    def merge(self, case: Any, row: Any) -> Any:
        return self.adapted(case).merged(row)

    def initial(self, case: Any) -> Any:
        return self.plain(case).pairs

    def save(self, case: Any, folder: Any) -> None:
        flix.save_adapter(self.adapted(case).to_adapter(), folder)

    def load(self, case: Any, folder: Any) -> Any:
        layer = self.plain(case)
        layer.load(flix.load_adapter(folder))
        return layer.pairs

    def state(self, model: Layer) -> Any:
        registry = model.config.registry
        pairs = {f: tuple(pair) for f, pair in model.pairs.items()}
        return {f: registry.id(*f) for f in registry.live}, pairs

    def add_feature(self, model: Layer, *arguments: Any) -> None:
        model.add(*arguments)

    def remove_feature(self, model: Layer, group: str, name: str) -> None:
        model.remove(group, name)

    def rename_feature(self, model: Layer, group: str, name: str, new: str) -> None:
        model.rename(group, name, new)

    def save_features(self, model: Layer, folder: Any, features: Any) -> None:
        flix.save_adapter(flix.select_features(model.to_adapter(), features), folder)

    def load_features(self, model: Layer, folder: Any) -> None:
        model.load(flix.combine_adapters([model.to_adapter(), flix.load_adapter(folder)]))


harness = Harness
