"""Adapted layers: what flax.nnx's Linear, LinearGeneral, Einsum and Embed become (docs/specification.md §1.1, §5.3).

The base computes as it always did (its dtype rules, precision and dot_general included); the routed sum is added.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flix.backends import messages
from flix.backends.jax import bypassed, finite, forms, scopes
from flix.backends.jax.functional import add_update, dropped
from flix.backends.jax.parameters import LayerBank, LayerSpec
from flix.backends.jax.patches import interception
from flix.backends.jax.patches.carrying import Carrying
from flix.backends.jax.routing import (
    CALL,
    ActiveRouting,
    in_force,
    make_routing,
    present_of,
    spread,
)
from flix.backends.jax.sharding import like_kernel
from flix.core.adapter.adapter import LayerShape
from flix.core.config.kernels import Form, LinearEinsum, linear_einsum
from flix.core.errors import TargetError


class FlixParam(nnx.Param[Any]):
    """A table of low-rank pairs; ``nnx.Optimizer(model, tx, wrt=FlixParam)`` trains only these."""


class FlixLayer(Carrying):
    """What all adapted layers share; mixed in before the layer's own class.

    Attributes:
        flix_A: all features' A, ``[P, d_in]``; of layers that are stacked, with the stack's axes in front.
        flix_B: all features' B, transposed, ``[P, d_out]``, likewise.
        flix_spec: the layer's path, sizes, ranks, scales and registry.
        flix_state: the model's :class:`flix.backends.jax.adapt.FlixState`.
        flix_strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        flix_dropout: a linear layer's ``nnx.RngStream`` for the masks of ``lora_dropout``, named "dropout" for
            ``nnx.reseed``; there where the rate is not 0.
        flix_kept: there where ``deterministic`` is the layer's own.
        deterministic: False while training; ``model.train()`` and ``model.eval()`` set it, as they do Dropout's.
    """

    flix_spec: LayerSpec
    flix_state: Any
    flix_strategy: str
    flix_A: Any
    flix_B: Any
    flix_dropout: Any
    flix_kept: bool
    deterministic: bool

    def __call__(
        self,
        inputs: Array,
        *args: Any,
        flix_features: Any = None,
        flix_weights: Any = None,
        **kw: Any,
    ) -> Array:
        """The layer's own call, with routing as in the model's; default: the one in force."""
        routing = self._routing(flix_features, flix_weights)
        if lead := self.flix_lead:
            raise TargetError(
                f"layer {self.flix_spec.path!r} is a stack {[*lead]} of layers, which run one at a time, in nnx.scan or "
                "nnx.vmap; it was called as a whole"
            )
        bypassed.ran(self)
        y = super().__call__(inputs, *args, **kw)  # type: ignore[misc]
        if routing is not None:
            y = interception.free(self._updated, y, inputs, routing)
        return y  # type: ignore[no-any-return]

    @property
    def bank(self) -> LayerBank:
        """The layer's pairs."""
        return LayerBank(self.flix_A[...], self.flix_B[...], self.flix_spec)

    @property
    def flix_lead(self) -> tuple[int, ...]:
        """The axes in front of the tables: those of a stack that ``scan`` and ``vmap`` have not taken off."""
        return tuple(self.flix_A.shape[:-2]) if self.flix_spec.lead else ()

    def put(self, bank: LayerBank) -> None:
        """Set the layer's pairs, and with them its spec; the tables take the kernel's sharding."""
        self.flix_spec = bank.spec
        finite.look_again(self)
        kernel, form = kernel_of(self), form_of(self)
        for name, table, axes in (
            ("flix_A", bank.A, form.contracted),
            ("flix_B", bank.B, form.free),
        ):
            value, metadata = like_kernel(table, kernel, axes)
            setattr(self, name, FlixParam(value, **metadata))

    def _routing(self, features: Any, weights: Any) -> ActiveRouting | None:
        """The routing to run under: the one given, or the one in force; None to run the base alone."""
        if scopes.disabled(self):
            return None
        spec = self.flix_spec
        if features is not None:
            present = present_of(self, spec.path)
            return make_routing(spec.registry, features, weights, present=present)
        routing = None if weights is not None else in_force(self, spec.path)
        if routing is None or routing.ids is None:
            raise messages.without_features(weights, spec.path, CALL)
        if routing.registry != spec.registry:
            raise messages.other_registry(spec.path, routing.registry, spec.registry)
        return routing

    def _updated(self, y: Array, x: Array, routing: ActiveRouting) -> Array:
        """y ``[..., d_out]`` plus the routed sum over x ``[..., d_in]``, or tokens ``[...]``."""
        spec, a, b = self.flix_spec, self.flix_A[...], self.flix_B[...]
        rate = self.flix_state.config.lora_dropout
        if rate and not self.deterministic and spec.shape.kind == "linear":
            if lead := self.flix_dropout.key.shape:
                raise TargetError(
                    f"layer {spec.path!r} runs by itself, but its stream for lora_dropout is that of its whole stack "
                    f"{[*lead]}; let nnx.scan take nnx.RngState along axis 0, as it takes nnx.Param"
                )
            x = dropped(x, rate, self.flix_dropout())
        if routing.present is None:
            finite.name_broken(spec, a, b, routing.ids, self.flix_state.named)
        return add_update(y, x, spec, a, b, routing, self.flix_strategy)

    def _flix_virtual(self) -> tuple[Any, Any]:
        finite.look_at(self)
        routing, mark = super()._flix_virtual()
        if routing is not None and self.flix_spec.lead:
            routing = spread(routing, self.flix_lead)
        return routing, mark


class FlixLinear(FlixLayer, nnx.Linear):
    """nnx.Linear, adapted: ``[B, ..., d_in]`` to ``[B, ..., d_out]``."""

    kernel = bypassed.Kernel()


class FlixLinearGeneral(FlixLayer, nnx.LinearGeneral):
    """nnx.LinearGeneral, adapted: ``[B, ..., *in]`` to ``[B, ..., *out]``.

    d_in and d_out are the products of its features, row-major in the kernel's order.
    """

    kernel = bypassed.Kernel()

    def _updated(self, y: Array, x: Array, routing: ActiveRouting) -> Array:
        outputs = tuple(self.out_features)
        y = super()._updated(
            forms.flattened(y, len(outputs)), forms.general_input(self, x), routing
        )
        return y.reshape(*y.shape[:-1], *outputs)


class FlixEinsum(FlixLayer, nnx.Einsum):
    """nnx.Einsum, adapted, if its equation is a linear map of the input with one kernel matrix."""

    kernel = bypassed.Kernel()

    def __call__(
        self, inputs: Array, einsum_str: str | None = None, *args: Any, **kw: Any
    ) -> Array:
        """The einsum of the input and the kernel; see :meth:`FlixLayer.__call__`."""
        if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str:
            raise TargetError(
                f"layer {self.flix_spec.path!r} is adapted for {self.einsum_str!r}, not {einsum_str!r}"
            )
        return super().__call__(inputs, None, *args, **kw)

    def _updated(self, y: Array, x: Array, routing: ActiveRouting) -> Array:
        equation, sizes = linear_einsum(self.einsum_str), form_of(self).sizes
        assert isinstance(equation, LinearEinsum)
        order = equation.output_order(y.ndim)
        y = forms.flattened(jnp.transpose(y, np.argsort(order).tolist()), len(sizes))
        x = jnp.transpose(x, equation.input_order(x.ndim))
        y = super()._updated(y, forms.flattened(x, len(equation.contracted)), routing)
        return jnp.transpose(y.reshape(*y.shape[:-1], *sizes), order)


class FlixEmbed(FlixLayer, nnx.Embed):
    """nnx.Embed, adapted: tokens ``[B, ...]`` to ``[B, ..., d_out]``; ``attend`` reads only the base's table."""


class FlixAround(FlixLayer):
    """Mixed in before a class whose own forward is called: a quantised layer, a subclass of Linear or Embed.

    It maps ``[..., d_in]`` to ``[..., d_out]``, or tokens ``[...]``, in whatever way; the routed sum is added to that.
    """

    def put(self, bank: LayerBank) -> None:
        """See :meth:`FlixLayer.put`; where the layer has no kernel ``[d_in, d_out]``, there is no sharding to take."""
        if kernel_of(self) is not None:
            return super().put(bank)
        self.flix_spec = bank.spec
        finite.look_again(self)
        self.flix_A, self.flix_B = FlixParam(bank.A), FlixParam(bank.B)

    def _updated(self, y: Array, x: Array, routing: ActiveRouting) -> Array:
        shape = self.flix_spec.shape
        lead = x.shape if shape.kind == "embedding" else x.shape[:-1]
        if y.shape != (*lead, shape.d_out):
            raise TargetError(
                f"layer {self.flix_spec.path!r} ({type(self).__name__}) maps {list(x.shape)} to {list(y.shape)}; features "
                f"are added to an output {[*lead, shape.d_out]}. Leave it out of target_modules"
            )
        return super()._updated(y, x, routing)


CLASSES: tuple[tuple[Any, Any, Any, str], ...] = (
    (nnx.Linear, FlixLinear, forms.linear_form, "linear"),
    (nnx.LinearGeneral, FlixLinearGeneral, forms.general_form, "linear"),
    (nnx.Einsum, FlixEinsum, forms.einsum_form, "linear"),
    (nnx.Embed, FlixEmbed, forms.linear_form, "embedding"),
)
"""(plain class, adapted class, how its kernel is a matrix, kind)"""


def kernel_of(layer: Any) -> Any:
    """The Variable that holds a layer's kernel; None of a layer with a forward of its own that has no such kernel."""
    name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
    known = {cls for base, target, *_ in CLASSES for cls in (base, target)}
    shape = None if type(layer) in known else forms.own_forward(layer)
    if shape is None:
        return getattr(layer, name)
    kernel = vars(layer).get(name)
    fits = isinstance(kernel, nnx.Variable) and kernel[...].shape[-2:] == (shape.d_in, shape.d_out)
    return kernel if fits else None


def lead_of(layer: Any, shape: LayerShape) -> tuple[int, ...]:
    """The axes in front of a layer's kernel: those of the stack that it is, if it is one.

    Args:
        layer: a plain or adapted layer.
        shape: what :func:`adaptable` says of it.
    """
    if not isinstance(kernel := kernel_of(layer), nnx.Variable):
        return ()
    known = type(layer) in {base for base, *_ in CLASSES} or isinstance(layer, FlixLayer)
    own = form_of(layer).shape if known else (shape.d_in, shape.d_out)
    return tuple(kernel.shape[: -len(own)])


def form_of(layer: Any) -> Form:
    """The form of the kernel of an adapted layer, or of a plain one that can be adapted; of a stack, of one layer's."""
    if isinstance(layer, FlixAround):
        shape = layer.flix_spec.shape
        return Form((0,), (1,), (shape.d_in, shape.d_out))
    find = next(find for base, _, find, _ in CLASSES if isinstance(layer, base))
    form, _ = find(layer, kernel_of(layer)[...])
    assert form is not None
    return form  # type: ignore[no-any-return]


def adaptable(module: nnx.Module) -> tuple[LayerShape | None, str]:
    """Kind and sizes of a layer that is adapted or can be; else the reason (empty for other kinds of modules)."""
    if isinstance(module, FlixLayer):
        return module.flix_spec.shape, ""
    found, reason = _adaptable(module)
    if found is not None and kernel_of(module) is None and forms.stacked_values(module, found):
        return None, "it is a stack of quantised layers"
    return found, reason


def _adaptable(module: Any) -> tuple[LayerShape | None, str]:
    for base, _, find, kind in CLASSES:
        if isinstance(module, base):
            if type(module) is not base:
                if (own := forms.own_forward(module)) is not None:
                    return own, ""
                return None, f"its class {type(module).__name__} has a call of its own"
            variable = kernel_of(module)
            if not isinstance(variable, nnx.Variable):  # it has parts: qwix's
                own = forms.own_forward(module) if base is nnx.Linear else None
                return own, "" if own else f"its kernel is quantised ({type(variable).__name__})"
            kernel = variable[...]
            held = str(getattr(kernel, "dtype", type(kernel).__name__))
            if held not in forms.FLOATS:
                return None, f"its kernel is quantised ({held})"
            form, reason = find(module, kernel)
            return (None if form is None else LayerShape(form.d_in, form.d_out, kind)), reason
    return forms.own_forward(module), ""


def pair_dtype(layer: Any) -> Any:
    """The dtype of a layer's pairs: float32 where a kernel has fewer bits, so that small updates do not round away."""
    kernel = kernel_of(layer)
    known = isinstance(kernel, nnx.Variable)
    return jnp.float64 if known and kernel[...].dtype == jnp.float64 else jnp.float32
