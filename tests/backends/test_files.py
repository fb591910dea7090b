"""One adapter file, three frameworks: trained in any, loaded through rename= in any other, the outputs are the same."""

import warnings

import numpy as np
import pytest

import flix

pytest.importorskip("jax")
pytest.importorskip("tensorflow")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402
import keras  # noqa: E402
from flax import nnx  # noqa: E402

from flix.backends import jax as flix_jax  # noqa: E402
from flix.backends import tensorflow as flix_tf  # noqa: E402
from flix.backends import torch as flix_torch  # noqa: E402
from tests.helpers import twins  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402

BACKENDS = ("torch", "jax", "tensorflow")
REGISTRY = flix.FeatureRegistry({"language": ["hau", "swa", "yor"], "task": ["ner", "pos"]})
ROWS = [
    {"language": "hau", "task": "ner"},
    {"language": {"swa": 0.5, "yor": 0.5}, "task": "pos"},
    {"language": "yor"},
]
RATE, EPS = 0.005, 1e-8  # a small eps: frameworks add it at different places
TOKENS = np.random.default_rng(0).integers(0, twins.VOCABULARY, (3, 9)).astype(np.int32)
TARGET = np.random.default_rng(1).normal(size=(3, 9, twins.SIZE)).astype(np.float32)


def config():
    """Unequal ranks, a scale that is not 1, linear layers and the embedding; by torch's paths."""
    return flix.FlixConfig(
        registry=REGISTRY,
        ranks=flix.ranks.by_group(language=2, task=3),
        alpha=4.0,
        scaling="rslora",
        target_modules=list(twins.PATHS),
    )


def routing(rows=ROWS):
    return REGISTRY.encode(rows, width=3)


class InTorch:
    plain = staticmethod(twins.torch_model)

    def train(self, model):
        parameters = flix_torch.trainable_parameters(model.train())
        optimizer = torch.optim.AdamW(parameters, RATE, eps=EPS, weight_decay=0.01)
        for _ in range(5):
            y = model(torch.tensor(TOKENS), flix_features=routing()).last_hidden_state
            ((y - torch.tensor(TARGET)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    def output(self, model, rows=ROWS):
        with torch.no_grad():
            found = model(torch.tensor(TOKENS), flix_features=routing(rows)).last_hidden_state
        return found.numpy()

    def merged(self, model, row):
        with torch.no_grad():
            return flix_torch.merge(model, row)(torch.tensor(TOKENS)).last_hidden_state.numpy()


@nnx.jit
def _routed(model, tokens, ids, weights):
    return model(tokens, flix_features=ids, flix_weights=weights)


@nnx.jit
def _plain(model, tokens):
    return model(tokens)


class InJax:
    plain = staticmethod(twins.jax_model)

    def train(self, model):
        tx = flix_jax.adamw(RATE, eps=EPS, weight_decay=0.01)
        optimizer = flix_jax.FlixOptimizer(model, tx)
        r = routing()

        def loss(model, ids, weights):
            y = model(jnp.asarray(TOKENS), flix_features=ids, flix_weights=weights)
            return ((y - TARGET) ** 2).mean()

        @nnx.jit
        def step(model, optimizer, ids, weights):
            _, gradients = flix_jax.value_and_grad(loss)(model, ids, weights)
            optimizer.update(model, gradients)

        for _ in range(5):
            step(model, optimizer, r.ids, r.weights)
        return model

    def output(self, model, rows=ROWS):
        r = routing(rows)
        return np.asarray(_routed(model, jnp.asarray(TOKENS), r.ids, r.weights))

    def merged(self, model, row):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # merged embeddings warn of attend()
            return np.asarray(_plain(flix_jax.merge(model, row), jnp.asarray(TOKENS)))


class InTensorflow:
    plain = staticmethod(twins.tensorflow_model)

    def inputs(self, rows=ROWS):
        r = routing(rows)
        return {"inputs": TOKENS, "flix_features": r.ids, "flix_weights": r.weights}

    def train(self, model):
        model.compile(keras.optimizers.AdamW(RATE, epsilon=EPS, weight_decay=0.01), "mse")
        model.fit(self.inputs(), TARGET, epochs=5, batch_size=len(ROWS), verbose=0)
        return model

    def output(self, model, rows=ROWS):
        return np.asarray(model(self.inputs(rows)))

    def merged(self, model, row):
        return np.asarray(flix_tf.merge(model, row)(TOKENS))


SIDES = {"torch": InTorch(), "jax": InJax(), "tensorflow": InTensorflow()}
MODULES = {"torch": flix_torch, "jax": flix_jax, "tensorflow": flix_tf}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """backend: (its trained model, the folder of its adapter)."""
    found = {}
    start = tmp_path_factory.mktemp("start") / "adapter"
    flix_torch.save(flix_torch.adapt(SIDES["torch"].plain(), config()), start)
    for name, side in SIDES.items():
        model = MODULES[name].load(side.plain(), start, rename=twins.renames("torch", name))
        model = side.train(model)
        folder = tmp_path_factory.mktemp(name) / "adapter"
        MODULES[name].save(model, folder)
        found[name] = model, folder
    return found


def test_bases_are_twins():
    torch_side, jax_side = SIDES["torch"].plain(), SIDES["jax"].plain()
    with torch.no_grad():
        expected = torch_side(torch.tensor(TOKENS)).last_hidden_state.numpy()
    assert_close(np.asarray(jax_side(jnp.asarray(TOKENS))), expected)
    assert_close(np.asarray(SIDES["tensorflow"].plain()(TOKENS)), expected)


@pytest.mark.covers("bert", "save and load", backend="jax")
@pytest.mark.covers("bert", "save and load", backend="tensorflow")
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("source", BACKENDS)
def test_trained_here_loaded_there(source, target, trained):
    model, folder = trained[source]
    expected = SIDES[source].output(model)
    side = SIDES[target]
    loaded = MODULES[target].load(side.plain(), folder, rename=twins.renames(source, target))
    assert_close(side.output(loaded), expected)
    assert_close(side.merged(loaded, ROWS[1]), SIDES[source].output(model, [ROWS[1]] * 3))
    # Training has moved the outputs: equality above does not mean equal bases.
    nothing = [{}] * len(ROWS)
    assert np.abs(side.output(loaded, nothing) - expected).max() > 0.05


def test_training_agrees(trained):
    """Five steps from one file end with the same outputs in each framework, to what AdamW makes of rounding."""
    outputs = {name: SIDES[name].output(model) for name, (model, _) in trained.items()}
    for name in ("jax", "tensorflow"):
        error = np.abs(outputs[name] - outputs["torch"]).max()
        assert error < 0.01, (name, error)
