"""A backend of flix in plain numpy: routed layers with their gradients, the primitives, and the verbs made of them."""

from types import SimpleNamespace

import numpy as np

from flix.backends import forward, messages
from flix.backends.protocol import Counts
from flix.backends.verbs import Verbs
from flix.core.adapter.adapter import LayerShape
from flix.core.config.targets import LayerInfo, is_head
from flix.core.errors import ConfigError, TargetError
from flix.core.features.routing import check_routing

current = forward.Forward()  # what this thread or asyncio task has open


class Layer:
    """y = W0 x + b + Σ_f w_ef s_f B_f (A_f x); an embedding's x are tokens, which stand for one-hot vectors."""

    def __init__(self, path, kernel, bias=None, kind="linear"):
        self.path, self.kernel, self.bias, self.dtype = path, kernel, bias, kernel.dtype
        self.shape, self.pairs, self.state = LayerShape(*kernel.shape, kind), {}, None

    def dense(self, x):
        return x if x.dtype.kind == "f" else np.float32(np.equal.outer(x, range(self.shape.d_in)))

    def active(self, x, ids, weights):
        """Of each feature of the batch: s, A, B, which rows list it, in which entries, their factors w s, and A x."""
        if self.state is None or current.is_off(self.state):
            return
        if ids is None:
            raise messages.without_features(weights, self.path, "model(x, ids, weights)")
        check_routing(ids, weights, self.state.config.registry, lead=x.shape[:-1])
        for number in np.unique(ids[ids >= 0]):
            feature, entries = self.state.config.registry.features[number], ids == number
            if feature in self.pairs:
                s, (a, b) = self.state.config.scale(self.path, feature), self.pairs[feature]
                rows, h = entries.any(-1), x[entries.any(-1)] @ a.T
                w = np.where(entries, 1.0 if weights is None else weights, 0.0)[rows]
                factor = s * w.sum(-1, dtype=self.dtype).reshape(-1, *[1] * (h.ndim - 1))
                yield feature, s, a, b, rows, entries[rows], factor, h

    def __call__(self, x, ids=None, weights=None):
        x = self.dense(x)
        y = x @ self.kernel + (0 if self.bias is None else self.bias)
        for _, _, _, b, rows, _, factor, h in self.active(x, ids, weights):
            y[rows] += np.where(factor, factor * (h @ b.T), 0)
        return y

    def backward(self, x, ids, weights, dy):
        """Gradients of Σ y · dy: of x, of the weights, and of the pairs by feature."""
        x = self.dense(x)
        dx, d_weights, pairs = dy @ self.kernel.T, np.zeros(ids.shape), {}
        for feature, s, a, b, rows, entries, factor, h in self.active(x, ids, weights):
            dh, all_but_last = dy[rows] @ b, [range(h.ndim - 1)] * 2
            d_weights[rows] += entries * s * (h * dh).sum(tuple(range(1, h.ndim)))[:, None]
            dx[rows] += np.where(factor, factor * (dh @ a), 0)
            da = np.tensordot(factor * dh, x[rows], all_but_last)
            pairs[feature] = (da, np.tensordot(dy[rows], factor * h, all_but_last))
        return dx, d_weights, pairs


class Model(dict):
    """Layers by path, one after another; adapted ones share its state."""

    state = held = None

    def __call__(self, x, ids=None, weights=None):
        if self.state is None and ids is not None:
            raise messages.merged(self.held) if self.held else messages.not_adapted("routing", self)
        for layer in self.values():
            x = layer(x, ids, weights)
        return x


class Primitives:
    """What flix.backends.protocol.Backend asks for; what each member does stands there."""

    def check_plain(self, model):
        if not isinstance(model, Model):
            raise TargetError(f"expected a flix_numpy.Model, got {type(model).__name__}")

    def layers(self, model):
        return [LayerInfo(p, head=is_head(p), **vars(x.shape)) for p, x in model.items()]

    def attach(self, model, config, paths, strategy, values):
        if strategy != "auto":
            raise ConfigError(f"the only strategy is 'auto', got {strategy!r}")
        model.state = SimpleNamespace(config=config, frozen=set())
        return self.write(model, {path: values(path, model[path].shape) for path in paths})

    def adapted(self, model):
        return model.state.config if isinstance(model, Model) and model.state else None

    def shapes(self, model):
        return {path: layer.shape for path, layer in model.items() if layer.state}

    def read(self, model, features=None):
        pairs = {path: model[path].pairs for path in self.shapes(model)}
        wanted = model.state.config.registry.live if features is None else features
        return {path: {f: own[f] for f in wanted if f in own} for path, own in pairs.items()}

    def write(self, model, pairs):
        for path, own in pairs.items():
            model[path].state = model.state  # it is adapted from now on, if it was not
            for feature, pair in own.items():
                model[path].pairs[feature] = [part.astype(model[path].dtype) for part in pair]
        return model

    def change(self, model, change):
        model.state.config = change.config
        model.state.frozen = set(change.keep(dict.fromkeys(model.state.frozen)))
        for layer in model.values():
            layer.pairs = change.keep(layer.pairs)
        return self.write(model, {p: change.pairs(p) for p in self.shapes(model) | change.layers})

    def frozen(self, model):
        return model.state.frozen

    def set_frozen(self, model, features):
        model.state.frozen = set(features)
        return model

    def parameters(self, model):
        return self.read(model, set(model.state.config.registry.live) - model.state.frozen)

    def count(self, model):
        base = [v for layer in model.values() for v in (layer.kernel, layer.bias) if v is not None]
        return Counts(sum(v.size for v in base))

    def switch(self, model, by):
        current.switch(model.state, by)

    def merged(self, model, active, update):
        plain = Model()
        for path, layer in model.items():
            kernel = layer.kernel + (update(path).T if layer.state else 0)
            plain[path] = Layer(path, kernel.astype(layer.dtype), layer.bias, layer.shape.kind)
        plain.held = active
        return plain


primitives = Primitives()
_v = Verbs(primitives)
adapt, save, load, load_into, to_adapter = _v.adapt, _v.save, _v.load, _v.load_into, _v.to_adapter
add_feature, remove_feature, rename_feature = _v.add_feature, _v.remove_feature, _v.rename_feature
load_features, import_peft, named_pairs = _v.load_features, _v.import_peft, _v.named_pairs
trainable_parameters, summary, merge = _v.trainable_parameters, _v.summary, _v.merge
freeze, thaw, disable = _v.freeze, _v.thaw, _v.disable
