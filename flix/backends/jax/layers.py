"""Adapted layers: what flax.nnx's Linear, LinearGeneral, Einsum and Embed become (docs/specification.md §1.1, §5.3).

The base computes as it always did (its dtype rules, precision and dot_general included); the routed sum is added.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from flix.backends.jax import _forms
from flix.backends.jax._forms import Form
from flix.backends.jax._routing import ActiveRouting, current, make_routing
from flix.backends.jax.bank import LayerBank, LayerSpec
from flix.backends.jax.functional import add_update
from flix.backends.jax.sharding import like_kernel
from flix.core.adapter.adapter import LayerShape
from flix.core.errors import RoutingError, TargetError


class FlixParam(nnx.Param[Any]):
    """A table of low-rank pairs; ``nnx.Optimizer(model, tx, wrt=FlixParam)`` trains these alone."""


class FlixLayer(nnx.Module):
    """What all adapted layers share; mixed in before the layer's own class.

    Attributes:
        flix_A: all features' A, ``[P, d_in]``.
        flix_B: all features' B, transposed, ``[P, d_out]``.
        flix_spec: the layer's path, sizes, ranks, scales and registry.
        flix_strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        flix_enabled: False while the model is disabled; static, so that compiled functions are traced anew.
        deterministic: False while training; ``model.train()`` and ``model.eval()`` set it, as they do Dropout's.
    """

    flix_spec: LayerSpec
    flix_strategy: str
    flix_form: Form
    flix_A: Any
    flix_B: Any
    flix_enabled = True
    deterministic: bool

    @property
    def bank(self) -> LayerBank:
        """The layer's pairs."""
        return LayerBank(self.flix_A[...], self.flix_B[...], self.flix_spec)

    def put(self, bank: LayerBank) -> None:
        """Set the layer's pairs, and with them its spec; the tables take the kernel's sharding."""
        self.flix_spec = bank.spec
        kernel = kernel_of(self)
        for name, table in (("flix_A", bank.A), ("flix_B", bank.B)):
            axis = self.flix_form.contracted if name == "flix_A" else self.flix_form.free
            value, metadata = like_kernel(table, kernel, axis)
            setattr(self, name, FlixParam(value, **metadata))

    def _routing(self, features: Any, weights: Any) -> ActiveRouting | None:
        """The routing to run under: the one given, or the one in force; None to run the base alone."""
        if not self.flix_enabled:
            return None
        if features is not None:
            return make_routing(self.flix_spec.registry, features, weights, present=current.present)
        if weights is not None:
            raise RoutingError(
                "flix_weights was given without flix_features; weights belong to ids"
            )
        if current.routing is not None:
            return current.routing
        if not self.deterministic:
            raise RoutingError(
                f"layer {self.flix_spec.path!r} is adapted and in training, but no routing is in force; "
                "pass flix_features=ids, int [batch, width], to the model (rows of base output: ids of "
                "-1), or call model.eval() to run the base alone"
            )
        warnings.warn(
            "an adapted model was called without flix_features: the base model answers alone. Pass "
            "flix_features=ids, or ids of -1 if this is meant",
            stacklevel=4,
        )
        return None

    def _add(self, y: Array, x: Array, routing: ActiveRouting) -> Array:
        """y ``[..., d_out]`` plus the routed sum over x."""
        return add_update(
            y, x, self.flix_spec, self.flix_A[...], self.flix_B[...], routing, self.flix_strategy
        )


class FlixLinear(FlixLayer, nnx.Linear):
    """nnx.Linear, adapted."""

    def __call__(
        self,
        inputs: Array,
        *args: Any,
        flix_features: Any = None,
        flix_weights: Any = None,
        **kw: Any,
    ) -> Array:
        """``[B, ..., d_in]`` to ``[B, ..., d_out]``; routing as in the model's call, default: the one in force."""
        routing = self._routing(flix_features, flix_weights)
        y = nnx.Linear.__call__(self, inputs, *args, **kw)
        return y if routing is None else self._add(y, inputs, routing)


class FlixLinearGeneral(FlixLayer, nnx.LinearGeneral):
    """nnx.LinearGeneral, adapted; d_in and d_out are the products of its features, row-major in the kernel's order."""

    def __call__(
        self,
        inputs: Array,
        *args: Any,
        flix_features: Any = None,
        flix_weights: Any = None,
        **kw: Any,
    ) -> Array:
        """``[B, ..., *in]`` to ``[B, ..., *out]``."""
        routing = self._routing(flix_features, flix_weights)
        y = nnx.LinearGeneral.__call__(self, inputs, *args, **kw)
        if routing is None:
            return y
        outputs = tuple(self.out_features)
        flat = y.reshape(*y.shape[: y.ndim - len(outputs)], -1)
        flat = self._add(flat, _forms.general_input(self, inputs), routing)
        return flat.reshape(*flat.shape[:-1], *outputs)


class FlixEinsum(FlixLayer, nnx.Einsum):
    """nnx.Einsum, adapted, where its equation is a linear map of the input with one kernel matrix."""

    def __call__(
        self,
        inputs: Array,
        einsum_str: str | None = None,
        *args: Any,
        flix_features: Any = None,
        flix_weights: Any = None,
        **kw: Any,
    ) -> Array:
        """The einsum of the input and the kernel."""
        if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str:
            raise TargetError(
                f"layer {self.flix_spec.path!r} is adapted for {self.einsum_str!r}, not {einsum_str!r}"
            )
        routing = self._routing(flix_features, flix_weights)
        y = nnx.Einsum.__call__(self, inputs, None, *args, **kw)
        if routing is None:
            return y
        equation, _ = _forms.parse_equation(self.einsum_str)
        assert equation is not None
        sizes = tuple(self.flix_form.shape[i] for i in self.flix_form.free)
        flat = _forms.einsum_moved(equation, y, sizes, back=False)
        flat = self._add(flat, _forms.einsum_input(equation, inputs), routing)
        return _forms.einsum_moved(equation, flat, sizes, back=True)


class FlixEmbed(FlixLayer, nnx.Embed):
    """nnx.Embed, adapted: the lookup gets the update; ``attend`` reads the base's table alone."""

    def __call__(
        self,
        inputs: Array,
        *args: Any,
        flix_features: Any = None,
        flix_weights: Any = None,
        **kw: Any,
    ) -> Array:
        """Tokens ``[B, ...]`` to ``[B, ..., d_out]``."""
        routing = self._routing(flix_features, flix_weights)
        y = nnx.Embed.__call__(self, inputs, *args, **kw)
        return y if routing is None else self._add(y, inputs, routing)


_CLASSES: tuple[tuple[Any, Any, Any, str], ...] = (
    (nnx.Linear, FlixLinear, _forms.linear_form, "linear"),
    (nnx.LinearGeneral, FlixLinearGeneral, _forms.general_form, "linear"),
    (nnx.Einsum, FlixEinsum, _forms.einsum_form, "linear"),
    (nnx.Embed, FlixEmbed, _forms.linear_form, "embedding"),
)


def kernel_of(layer: Any) -> Any:
    """The Variable that holds a layer's kernel."""
    return layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel


def adaptable(module: nnx.Module) -> tuple[LayerShape | None, Form | None, str]:
    """Sizes and form of a layer that is adapted or can be; else the reason (empty for other kinds of modules)."""
    if isinstance(module, FlixLayer):
        return module.flix_spec.shape, module.flix_form, ""
    for base, _, find, kind in _CLASSES:
        if not isinstance(module, base):
            continue
        if type(module) is not base:
            return None, None, f"its class {type(module).__name__} has a call of its own"
        form, reason = find(module, kernel_of(module)[...])
        if form is None:
            return None, None, reason
        return LayerShape(form.d_in, form.d_out, kind), form, ""
    return None, None, ""


def become(module: nnx.Module, form: Form, strategy: str, bank: LayerBank) -> None:
    """Turn a plain layer into its adapted class, in place: references and sharing stay as they are."""
    target = next(target for base, target, _, _ in _CLASSES if type(module) is base)
    change_class(module, target)
    assert isinstance(module, FlixLayer)
    module.flix_form = form
    module.flix_strategy = strategy
    module.deterministic = False
    module.put(bank)


def revert(module: FlixLayer) -> None:
    """Turn an adapted layer back into the plain layer it was, in place."""
    base = next(base for base, target, _, _ in _CLASSES if type(module) is target)
    for name in [*(n for n in vars(module) if n.startswith("flix_")), "deterministic"]:
        delattr(module, name)
    change_class(module, base)


def change_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    """Change a module's class, past nnx's account of attributes."""
    object.__setattr__(module, "__class__", cls)


def pair_dtype(kernel: Array) -> Any:
    """The dtype of pairs: a half-precision base's are kept in float32, where small updates do not round away."""
    halves = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
    return jnp.float32 if kernel.dtype in halves else jax.dtypes.canonicalize_dtype(kernel.dtype)
