"""Patch: a layer's class.

What: a plain ``nnx.Linear``, ``LinearGeneral``, ``Einsum`` or ``Embed`` becomes an instance of its adapted class, in
place, so that references and sharing stay as they are; it gets ``flix_...`` attributes and ``deterministic``.
When: a model is adapted, or one of its layers becomes adapted.
Undone: :func:`revert`, on the copy that ``merge`` makes.
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from flix.backends.jax.layers import CLASSES, FlixLayer
from flix.backends.jax.parameters import LayerBank
from flix.core.adapter.initial import dropout_seed


def become(module: nnx.Module, strategy: str, state: Any, bank: LayerBank, training: bool) -> None:
    """Turn a plain layer into an adapted one."""
    change_class(module, next(target for base, target, _, _ in CLASSES if type(module) is base))
    assert isinstance(module, FlixLayer)
    module.flix_strategy, module.flix_state = strategy, state
    module.deterministic = not training
    config, spec = state.config, bank.spec
    if config.lora_dropout and spec.shape.kind == "linear":
        seed = dropout_seed(config.seed, spec.path)
        module.flix_dropout = nnx.RngStream(seed, tag="dropout")
    module.put(bank)


def revert(module: FlixLayer) -> None:
    """Turn an adapted layer back into the plain layer it was."""
    base = next(base for base, target, _, _ in CLASSES if type(module) is target)
    drop_attributes(module, "deterministic")
    change_class(module, base)


def drop_attributes(module: nnx.Module, *names: str) -> None:
    """Delete these attributes and all of flix."""
    for name in [*(n for n in vars(module) if n.startswith("flix_")), *names]:
        delattr(module, name)


def change_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    """Change a module's class, past nnx's account of attributes."""
    object.__setattr__(module, "__class__", cls)
