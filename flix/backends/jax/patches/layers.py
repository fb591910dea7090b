"""Patch: a layer's class.

What: a plain ``nnx.Linear``, ``LinearGeneral``, ``Einsum`` or ``Embed`` becomes an instance of its adapted class, in
place, so that references and sharing stay as they are; it gets ``flix_...`` attributes and ``deterministic``. A layer
whose own forward is called becomes one of a subclass of its own class, which Python knows by itself, weakly.
When: a model is adapted, or one of its layers becomes adapted.
Undone: :func:`revert`, on the copy that ``merge`` makes.
"""

from __future__ import annotations

import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flix.backends.jax import bypassed
from flix.backends.jax.layers import CLASSES, FlixAround, FlixLayer, kernel_of
from flix.backends.jax.parameters import LayerBank
from flix.core.adapter.initial import dropout_seed


def become(module: nnx.Module, strategy: str, state: Any, bank: LayerBank, training: bool) -> None:
    """Turn a plain layer into an adapted one; one with a ``deterministic`` of its own keeps that."""
    whole = isinstance(kernel_of(module), nnx.Variable)  # else it has parts: qwix's
    target = next((t for base, t, _, _ in CLASSES if type(module) is base and whole), None)
    change_class(module, target or around_class(type(module)))
    assert isinstance(module, FlixLayer)
    module.flix_strategy, module.flix_state = strategy, state
    if "deterministic" in vars(module):
        module.flix_kept = True
    else:
        module.deterministic = not training
    config, spec = state.config, bank.spec
    if config.lora_dropout and spec.shape.kind == "linear":
        seeds = [dropout_seed(config.seed, path) for path in spec.stack or (spec.path,)]
        module.flix_dropout = stream = nnx.RngStream(seeds[0], tag="dropout")
        if spec.stack:  # one for each layer: scan and vmap take theirs out
            keys = jnp.stack([jax.random.key(seed) for seed in seeds])
            stream.key.set_value(keys.reshape(spec.lead))
            stream.count.set_value(jnp.zeros(spec.lead, jnp.uint32))
    module.put(bank)


def revert(module: FlixLayer) -> None:
    """Turn an adapted layer back into the plain layer it was."""
    base = next((base for base, target, _, _ in CLASSES if type(module) is target), None)
    drop_attributes(module, *(() if "flix_kept" in vars(module) else ("deterministic",)))
    change_class(module, base or type(module).flix_plain)  # type: ignore[attr-defined]


_making = threading.Lock()


class Remade(FlixAround):
    """A class made at run time; pickles name the layer's own instead."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return (_new_around, (type(self).flix_plain,), state)  # type: ignore[attr-defined]


def _new_around(base: type[nnx.Module]) -> Any:
    return object.__new__(around_class(base))


def around_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of a layer's own class that adds the features to its output; the same one each time."""
    with _making:
        made = (cls for cls in base.__subclasses__() if vars(cls).get("flix_plain") is base)
        return next(made, None) or _make_around(base)


def _make_around(base: type[nnx.Module]) -> type[nnx.Module]:
    own: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    own["flix_plain"] = base
    if issubclass(base, nnx.Linear) and not hasattr(base, "kernel"):
        own["kernel"] = bypassed.Kernel()
    keywords = {"pytree": base._pytree__is_pytree}
    return types.new_class(base.__name__, (Remade, base), keywords, lambda body: body.update(own))


def drop_attributes(module: nnx.Module, *names: str) -> None:
    """Delete these attributes and all of flix."""
    for name in [*(n for n in vars(module) if n.startswith("flix_")), *names]:
        delattr(module, name)


def change_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    """Change a module's class, past nnx's account of attributes."""
    object.__setattr__(module, "__class__", cls)
