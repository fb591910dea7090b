"""Banks without a model, and adapter files: round trips, other frameworks' files, refusals, merged kernels."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import (
    adapt,
    add_feature,
    disable,
    freeze,
    init,
    linear,
    load,
    load_bank,
    load_features,
    merge,
    merge_kernels,
    named_pairs,
    save,
    summary,
    thaw,
    trainable_parameters,
)
from flix.backends.jax.adapt import flix_layers
from tests.helpers.jax import (
    BIAS,
    D_IN,
    D_OUT,
    KERNEL,
    TARGETS,
    TOKENS,
    Net,
    adapted,
    normal,
    random_bank,
    randomize,
)
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import (
    assert_all_same_bits,
    assert_close,
    same_bits,
)


@pytest.mark.covers("pytree", "save and load", backend="jax")
def test_bank_round_trip(tmp_path: Path) -> None:
    cfg = config()
    bank = random_bank(cfg, {"layers.0.q": (5, 7), "e": (9, 7, "embedding")})
    save((cfg, bank), tmp_path)
    found_cfg, found = load_bank(tmp_path, rename={"e": "embed"})
    assert found_cfg == cfg
    assert set(found) == {"layers.0.q", "embed"}
    assert same_bits(found["layers.0.q"].A, bank["layers.0.q"].A)
    assert same_bits(found["embed"].B, bank["e"].B)
    assert jax.tree.structure(found["layers.0.q"]) == jax.tree.structure(bank["layers.0.q"])
    assert summary((cfg, bank)).features["task", "pos"] == 4 * (12 + 16)
    grown_cfg, grown = add_feature((cfg, bank), "language", "fra", init_from=["hau", "swa"])
    assert len(grown_cfg.registry) == 7
    assert grown["e"].spec.frozen == frozenset(range(6))


LAYERS = {"q": (5, 7), "table": (9, 3, "embedding")}


def test_banks_freeze_and_thaw() -> None:
    bank = random_bank(config(), LAYERS)
    frozen = freeze(freeze(bank, [("task", "ner")]), {"language": ["hau", "swa"]})
    assert frozen["q"].spec.frozen == frozen["table"].spec.frozen == {0, 1, 4}
    assert not bank["q"].spec.frozen
    cfg, both = freeze((config(), bank), {"task": "ner"})
    assert cfg == config() and both["q"].spec.frozen == {4}
    assert thaw(frozen, {"task": "ner"})["q"].spec.frozen == {0, 1}
    assert not thaw((cfg, both))[1]["q"].spec.frozen


@functools.partial(jax.jit, static_argnames="strategy")
def run(x: Any, layer: Any, ids: Any, weights: Any = None, strategy: str = "auto") -> Any:
    return linear(x, KERNEL, layer, ids, weights, strategy=strategy)


@pytest.mark.covers("pytree", "merge", backend="jax")
def test_merge_kernels_equals_forward() -> None:
    cfg = config()
    bank = random_bank(cfg, {"q": (D_IN, D_OUT)})
    row = {"language": {"swa": 0.5, "zul": -2.0}, "task": "pos"}
    merged = merge_kernels(cfg, bank, {"q": KERNEL, "other": BIAS}, row)
    routing = cfg.registry.encode([row, row])
    x = normal(2, 9, D_IN)
    assert_close(x @ merged["q"], run(x, bank["q"], routing.ids, routing.weights))
    assert merged["other"] is BIAS
    with pytest.raises(flix.TargetError, match="'q' needs a kernel"):
        merge_kernels(cfg, bank, {}, row)


@nnx.jit
def forward(model: Any, x: Any, ids: Any, weights: Any) -> Any:
    return model(x, flix_features=ids, flix_weights=weights)


@pytest.mark.covers("nnx", "save and load", backend="jax")
def test_model_round_trip(tmp_path: Path) -> None:
    model = adapted()
    wanted = forward(model, TOKENS, IDS, WEIGHTS)
    save(model, tmp_path)
    for other in (Net(), adapt(Net(), config(target_modules=TARGETS))):
        found = load(other, tmp_path)
        assert found is other
        assert_all_same_bits(named_pairs(found), named_pairs(model))
        assert_close(forward(found, TOKENS, IDS, WEIGHTS), wanted)
        assert found.flix_config == model.flix_config
    adapter = flix.load_adapter(tmp_path)
    a, b = adapter.pair("layers.0.e", ("task", "pos"))
    assert (a.shape, b.shape) == ((4, 6), (6, 4))
    assert adapter.layers["embed"].kind == "embedding"


class Twin(nnx.Module):
    """The twin of the torch model below."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(9, 6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.LinearGeneral(8, (2, 3), use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        y = self.down(jax.nn.relu(self.up(self.embed(tokens))))
        return y.reshape(*tokens.shape, 6)


def test_torch_and_jax_read_each_other(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the torch backend is not installed")
    from flix.backends import torch as flix_torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(9, 6)
            self.fc1 = torch.nn.Linear(6, 8)
            self.fc2 = torch.nn.Linear(8, 6, bias=False)

        def forward(self, tokens: Any) -> Any:
            return self.fc2(torch.relu(self.fc1(self.embed(tokens))))

    torch.manual_seed(0)
    cfg = config(target_modules=["embed", "fc1", "fc2"], rank_pattern={"fc2": {"task": 1}})
    theirs = Model()
    base = {name: p.detach().numpy().copy() for name, p in theirs.named_parameters()}

    def twin() -> Any:
        made = Twin()
        made.embed.embedding[...] = jnp.asarray(base["embed.weight"])
        made.up.kernel[...] = jnp.asarray(base["fc1.weight"].T)
        made.up.bias[...] = jnp.asarray(base["fc1.bias"])
        made.down.kernel[...] = jnp.asarray(base["fc2.weight"].T).reshape(8, 2, 3)
        return made

    ours = twin()
    flix_torch.adapt(theirs, cfg)
    with torch.no_grad():
        for p in flix_torch.trainable_parameters(theirs):
            p.normal_(0, 0.3)
    flix_torch.save(theirs, tmp_path / "torch")
    load(ours, tmp_path / "torch", rename={"fc1": "up", "fc2": "down"})
    tokens = np.random.default_rng(0).integers(0, 9, (5, 4))

    def from_torch(model: Any) -> Any:
        ids, weights = torch.from_numpy(IDS), torch.from_numpy(WEIGHTS)
        out = model(torch.from_numpy(tokens), flix_features=ids, flix_weights=weights)
        return out.detach().numpy()

    assert_close(forward(ours, tokens, IDS, WEIGHTS), from_torch(theirs))

    randomize(ours, seed=4)
    save(ours, tmp_path / "jax")
    flix_torch.load(theirs, tmp_path / "jax", rename={"up": "fc1", "down": "fc2"})
    assert_close(forward(ours, tokens, IDS, WEIGHTS), from_torch(theirs))
    # What is read and written again, by a model of the same base, has the same bytes.
    save(load(twin(), tmp_path / "jax"), tmp_path / "again")
    one, two = ((tmp_path / d / "flix.safetensors").read_bytes() for d in ("jax", "again"))
    assert one == two
    # The base is one in both frameworks.
    bases = {flix.load_adapter(tmp_path / d).base for d in ("torch", "jax")}
    assert len(bases) == 1 and None not in bases


def test_initial_values_are_torchs() -> None:
    torch = pytest.importorskip("torch", reason="the torch backend is not installed")
    from flix.backends import torch as flix_torch

    model = torch.nn.Sequential(torch.nn.Linear(5, 7))
    flix_torch.adapt(model, config(seed=11))
    bank = init(config(seed=11), {"0": (5, 7)})
    theirs = flix_torch.to_adapter(model).tensors
    ours = named_pairs((config(seed=11), bank))
    assert set(ours) == set(theirs)
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


def test_refusals(tmp_path: Path) -> None:
    save(adapted(), tmp_path / "good")
    with pytest.raises(flix.AdapterError, match=r"no layer 'layers\.0\.zzz'"):
        load(Net(), tmp_path / "good", rename={"layers.0.q": "layers.0.zzz"})
    with pytest.raises(flix.AdapterError, match="hau has rank 2 in the model and 1"):
        other = config(
            target_modules=TARGETS,
            ranks={
                "language": {"hau": 2, "swa": 3, "yor": 0, "zul": 2},
                "task": {"ner": 2, "pos": 4},
            },
        )
        load(adapt(Net(), other), tmp_path / "good")
    with pytest.raises(flix.AdapterError, match="is adapted, but not in the adapter"):
        cfg = config(target_modules=[*TARGETS, "lm_head"])
        load(adapt(Net(), cfg), tmp_path / "good")
    with pytest.raises(flix.TargetError, match="needs an adapted model"):
        save(Net(), tmp_path / "bad")
    with pytest.raises(flix.TargetError, match="this dict is not"):
        save({"q": 1}, tmp_path / "bad")
    with pytest.raises(flix.TargetError, match=r"give \(config, bank\)"):
        save(init(config(), {"q": (5, 7)}), tmp_path / "bad")
    description = json.loads((tmp_path / "good" / "flix_config.json").read_text())
    assert "layers.0.o" in description["layers"]


def test_load_keeps_dtype_and_strategy(tmp_path: Path) -> None:
    save(adapted(), tmp_path)
    model = load(Net(), tmp_path, strategy="gather")
    for _, layer in flix_layers(model):
        assert layer.flix_strategy == "gather"
        assert layer.flix_A.dtype == jnp.float32
    cfg, bank = load_bank(tmp_path)
    x = jnp.ones((5, 2, 6))
    kernel = model.layers[0].back.kernel[...]
    y = linear(x, kernel, bank["layers.0.back"], IDS, bias=model.layers[0].back.bias[...])
    assert_close(model.layers[0].back(x, flix_features=IDS), y)
    assert cfg.registry == model.flix_config.registry


def bits(source: Any) -> dict[str, bytes]:
    return {name: np.asarray(value).tobytes() for name, value in named_pairs(source).items()}


@pytest.mark.covers("pytree", "share a feature", backend="jax")
def test_conflicts_and_banks(tmp_path: Path) -> None:
    ours = (config(), random_bank(config(), LAYERS))
    theirs = (config(), random_bank(config(), {"q": (5, 7), "k": (4, 2)}, seed=1))
    save(theirs, tmp_path)
    with pytest.raises(flix.AdapterError, match=r"language=hau .*other values in A of layer 'q'"):
        load_features(ours, tmp_path)
    kept = load_features(ours, tmp_path, conflicts="keep")
    assert bits(kept) == bits(ours)
    cfg, bank = load_features(
        ours, tmp_path, {"task": ["ner", "pos"]}, conflicts="replace", freeze_others=True
    )
    wanted = {n: v for n, v in bits(theirs).items() if ".task." in n}
    assert bits((cfg, bank)) == {
        **{n: v for n, v in bits(ours).items() if ".language." in n},
        **wanted,
    } | {n: v for n, v in bits(ours).items() if n.startswith("table") and ".language." in n}
    assert bank["k"].spec.frozen == {0, 1, 2, 3}
    everything = load_features(ours, tmp_path, conflicts="replace", freeze_others=True)
    assert everything[1]["q"].spec.frozen == {2}  # of rank 0 on both sides: the same
    assert bits(load_bank(tmp_path)) == bits(theirs)


def test_pairs_of_configuration_and_bank_take_every_verb_that_needs_no_call(tmp_path: Path) -> None:
    ours = (config(), random_bank(config(), LAYERS))
    theirs = (config(), random_bank(config(), LAYERS, seed=1))
    save(theirs, tmp_path)
    loaded = load(ours, tmp_path)
    assert bits(loaded) == bits(theirs) != bits(ours)
    assert trainable_parameters(loaded) is loaded[1]
    with pytest.raises(flix.AdapterError, match="'q' is linear 5 -> 7 in the adapter"):
        load((config(), random_bank(config(), {"q": (5, 6), "table": LAYERS["table"]})), tmp_path)
    with pytest.raises(flix.AdapterError, match="is not adapted in the model"):
        load((config(), random_bank(config(), {"q": (5, 7)})), tmp_path)
    with pytest.raises(flix.TargetError, match="merge_kernels"):
        merge(ours, {"language": "hau"})
    with pytest.raises(flix.TargetError, match="disable needs a model"), disable(ours):
        pass
    with pytest.raises(flix.TargetError, match="adapted already"):
        adapt(ours, config())
    with pytest.raises(flix.TargetError, match=r"give \(config, bank\)"):
        add_feature(ours[1], "language", "fra", rank=2)
