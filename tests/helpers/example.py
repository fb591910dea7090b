"""Models of the example backend in numpy, on which the verbs' own logic is tested."""

from __future__ import annotations

import flix_numpy
import numpy as np
from flix_numpy import Layer, Model

import flix
from flix.backends.verbs import Verbs
from flix.core.adapter.described import Head
from flix.core.adapter.heads import Place
from flix.core.peft.exporting import PeftFacts
from tests.helpers.registry import config

verbs = Verbs(flix_numpy.primitives)
ROW = {"language": "swa", "task": "pos"}
SWA, POS = ("language", "swa"), ("task", "pos")


def plain(**sizes):
    """An embedding, two linear layers, and a head."""
    rng = np.random.default_rng(0)
    sizes = {"embed": (7, 4), "q": (4, 6), "k": (6, 5), "lm_head": (5, 3), **sizes}
    kernels = {path: rng.normal(size=size).astype(np.float32) for path, size in sizes.items()}
    kinds = {path: "embedding" if path == "embed" else "linear" for path in sizes}
    bias = {"k": rng.normal(size=sizes["k"][1]).astype(np.float32)}
    return Model({p: Layer(p, kernels[p], bias.get(p), kinds[p]) for p in sizes})


def randomized(model, seed=1):
    rng = np.random.default_rng(seed)
    for layer in model.values():
        layer.pairs = {
            feature: [rng.normal(size=part.shape).astype(np.float32) for part in pair]
            for feature, pair in layer.pairs.items()
        }
    return model


def adapted(**changes):
    return randomized(verbs.adapt(plain(), config(**changes)))


def tokens(rows=5):
    return np.random.default_rng(2).integers(0, 7, (rows, 3)).astype(np.int32)


def values(model):
    return verbs.named_pairs(model)


def same(found, expected):
    assert set(expected) <= set(found)
    for name, value in expected.items():
        assert value.dtype == found[name].dtype and np.array_equal(value, found[name]), name


def donor(**changes):
    """An adapter of a language and a task of its own, and of one that the other model has."""
    registry = flix.FeatureRegistry(
        {"language": ["ibo", "swa"], "task": ["mt"]},
        implies={("language", "ibo"): [("task", "mt")]},
    )
    settings = {"registry": registry, "ranks": 2, "alpha": 3.0, "scaling": "rslora", **changes}
    return randomized(verbs.adapt(plain(), flix.FlixConfig(**settings)), seed=5)


class Folding(flix_numpy.Primitives):
    """Folds compositions, has a head that trains, and knows PEFT's names."""

    def fold(self, model, row, update):
        model.row, model.kernels = row, {p: model[p].kernel for p in self.shapes(model)}
        for path, kernel in model.kernels.items():
            model[path].kernel = (kernel + update(path).T).astype(kernel.dtype)
        self.switch(model, 1)

    def folded(self, model):
        return getattr(model, "row", None)

    def unfold(self, model):
        for path, kernel in model.kernels.items():
            model[path].kernel = kernel
        model.row = None
        self.switch(model, -1)

    def head_places(self, model):
        return {f"{p}.kernel": Place(layer.kernel.shape, [p]) for p, layer in model.items()}

    def heads(self, model, names=None):
        known = vars(model).get("own_heads", ("lm_head.kernel",))
        model.own_heads = known if names is None else tuple(names)
        return {n: Head.of(model[n.removesuffix(".kernel")].kernel) for n in model.own_heads}

    def put_heads(self, model, heads):
        for name, head in heads.items():
            model[name.removesuffix(".kernel")].kernel = head.array()
        model.own_heads = tuple(heads)
        return model

    def base_name(self, model):
        return "example", None

    def kernel_samples(self, model, places):
        kernels = getattr(model, "kernels", {}) if self.folded(model) else {}
        return {
            p: kernels.get(p, model[p].kernel)[where.columns, where.rows]
            for p, where in places.items()
        }

    def peft_facts(self, model):
        return PeftFacts(target_modules=list(self.shapes(model)), architecture="Model", modules={})


folding = Verbs(Folding())
