"""What the conformance kit runs of this backend, beside its verbs: see flix_conformance.harness.Harness."""

import numpy as np

from flix_numpy import Layer, Model


class AdamW:
    """Moves the features that have gradients; the steps of each are counted by itself."""

    def __init__(self, layer, settings):
        self.layer, self.settings, self.moments = layer, settings, {}

    def step(self, gradients):
        s, registry = self.settings, self.layer.state.config.registry
        for feature in gradients.keys() - self.layer.state.frozen:
            pair, number = list(self.layer.pairs[feature]), registry.id(*feature)  # names change
            for part, g in enumerate(gradients[feature]):
                m, v, t = self.moments.get((number, part), (0, 0, 0))
                m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
                self.moments[number, part] = m, v, t + 1
                step = (
                    m / (1 - s.beta1 ** (t + 1)) / (np.sqrt(v / (1 - s.beta2 ** (t + 1))) + s.eps)
                )
                pair[part] = (pair[part] - s.lr * (step + s.decay * pair[part])).astype(g.dtype)
            self.layer.pairs[feature] = pair


class Harness:
    """Plain models, calls, gradients and training: numpy in, numpy out."""

    dtypes, strategies, kinds = ("float32", "float64"), ("auto",), ("linear", "embedding")
    layer, optimizer = Layer, AdamW

    def plain(self, layers, x):
        made = [self.layer(p.path, p.kernel.astype(p.dtype), p.bias, p.kind) for p in layers]
        return Model({layer.path: layer for layer in made})

    def call(self, model, batch, path=None):
        y = (model if path is None else model[path])(batch.x, batch.ids, batch.weights)
        return y, y.dtype.name

    def gradients(self, model, batch, dy):
        (layer,) = model.values()
        dx, d_weights, pairs = layer.backward(batch.x, batch.ids, batch.weights, dy)
        x = dx if layer.shape.kind == "linear" else None
        weights = None if batch.weights is None else d_weights
        return {"x": x, "weights": weights, "pairs": pairs, "base": None}

    def trainer(self, model, settings):
        optimizer = self.optimizer(*model.values(), settings)

        def step(batch):
            dy = (self.call(model, batch)[0] - batch.target) / len(batch.x)
            optimizer.step(self.gradients(model, batch, dy)["pairs"])

        return step

    def kernel(self, model, path):
        return model[path].kernel


harness = Harness
