"""Trained heads of nnx models, and the base that they and the features were trained on."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flix
from flix.backends.jax import adapt, add_feature, load, load_bank, save
from flix.core.adapter.described import Head
from tests.helpers.heads import check_every_stop, fingerprint_of, wrong_heads
from tests.helpers.jax import Net, adapted, random_bank
from tests.helpers.registry import config

HEAD = {"lm_head.kernel", "lm_head.bias"}


def trained(value: float = 3.0) -> Any:
    model = adapted()
    model.lm_head.kernel[...] = jnp.full_like(model.lm_head.kernel[...], value)
    return model


def test_heads_are_named_once_and_loaded(tmp_path: Path) -> None:
    model = trained()
    save(model, tmp_path)
    assert flix.load_adapter(tmp_path).heads == {}
    save(model, tmp_path, heads=["lm_head"])
    assert set(flix.load_adapter(tmp_path).heads) == HEAD
    loaded = load(Net(seed=0), tmp_path)
    assert (loaded.lm_head.kernel[...] == 3).all()
    loaded = add_feature(loaded, "language", "fra", 2)
    save(loaded, tmp_path)  # remembered, also after the features changed
    assert set(flix.load_adapter(tmp_path).heads) == HEAD
    without = load(Net(seed=0), tmp_path, heads=False)
    assert not (without.lm_head.kernel[...] == 3).any()


def test_dtypes_are_kept(tmp_path: Path) -> None:
    model = adapted()
    for name, dtype in (("kernel", jnp.bfloat16), ("bias", jnp.float16)):
        variable = getattr(model.lm_head, name)
        setattr(model.lm_head, name, nnx.Param(variable[...].astype(dtype) + 1.5))
    save(model, tmp_path, heads=["lm_head"])
    found = flix.load_adapter(tmp_path).heads
    assert {n: h.dtype for n, h in found.items()} == {"lm_head.kernel": "BF16", "lm_head.bias": "F16"}  # fmt: skip
    loaded = load(Net(), tmp_path)
    assert loaded.lm_head.kernel[...].dtype == jnp.float32
    assert (loaded.lm_head.kernel[...] == model.lm_head.kernel[...].astype(jnp.float32)).all()


def test_a_head_is_no_adapted_kernel_and_has_a_place(tmp_path: Path) -> None:
    model = trained()
    for name in ("layers.0.q", "embed"):
        with pytest.raises(flix.AdapterError, match=f"kernel of the adapted layer '{name}'"):
            save(model, tmp_path, heads=[name])
    save(model, tmp_path)
    wrong = [
        ("layers.0.q.kernel", (6, 2, 4), "kernel of the adapted layer 'layers.0.q'"),
        ("lm_head.kernel", (5, 6), r"has the shape \[5, 6\] in the adapter, but this Net's has \[6, 5\]"),
        ("lm_had.kernel", (6, 5), "'lm_had.kernel', which this Net does not have"),
    ]  # fmt: skip
    for error in wrong_heads(tmp_path, wrong):
        plain = Net()
        with error:
            load(plain, tmp_path)
        assert not hasattr(plain, "flix_state")


def test_banks_have_no_heads(tmp_path: Path) -> None:
    cfg = config()
    pair = (cfg, random_bank(cfg, {"q": (5, 7)}))
    save(pair, tmp_path)
    found = flix.load_adapter(tmp_path)
    assert found.base is None
    head = Head("F32", np.zeros(3, "f4"))
    flix.save_adapter(replace(found, heads={"x": head}), tmp_path)
    with pytest.raises(
        flix.AdapterError, match=r"'x', which this tuple does not have.*heads=False"
    ):
        load(pair, tmp_path)
    load(pair, tmp_path, heads=False)
    load_bank(tmp_path)
    with pytest.raises(flix.AdapterError, match="no parameter or module 'x'"):
        save(pair, tmp_path, heads=["x"])


def test_every_stop_of_a_save_leaves_one_version(tmp_path: Path) -> None:
    check_every_stop(
        tmp_path,
        [trained(1.0), trained(2.0)],
        lambda model: save(model, tmp_path, heads=["lm_head"]),
        lambda: set(np.unique(load(Net(), tmp_path).lm_head.kernel[...])),
    )


def test_the_base_is_told_and_compared(tmp_path: Path) -> None:
    """By its kernels as matrices, whatever axes they have."""
    save(adapted(), tmp_path)
    base = flix.load_adapter(tmp_path).base
    layers = flix.load_adapter(tmp_path).layers
    net = Net()
    block = net.layers[0]
    kernels = {
        "embed": net.embed.embedding[...].T,
        "layers.0.q": block.q.kernel[...].reshape(6, 8).T,
        "layers.0.o": block.o.kernel[...].reshape(8, 6).T,
        "layers.0.e": block.e.kernel[...].transpose(1, 0, 2).reshape(6, 6).T,
        "layers.0.back": block.back.kernel[...].T,
    }
    assert base is not None and base.fingerprint == fingerprint_of(layers, kernels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(Net(), tmp_path)
        load(adapted(), tmp_path)
    with pytest.warns(UserWarning, match=f"fingerprint {base.fingerprint}.*is loaded onto"):
        load(Net(seed=1), tmp_path)
    half = Net()
    half.lm_head.kernel[...] = half.lm_head.kernel[...] + 1  # no adapted kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(half, tmp_path)


def test_heads_are_no_part_of_a_compiled_functions_key() -> None:
    model = adapt(Net(), config(target_modules=["q"]))
    state = model.flix_state
    assert replace(state, heads=("lm_head.kernel",)) == state
    assert hash(replace(state, heads=("lm_head.kernel",))) == hash(state)
