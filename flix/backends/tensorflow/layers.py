"""Adapted layers: what Dense, EinsumDense and Embedding become (docs/specification.md §1.1, §5.4)."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

from flix.backends.tensorflow._einsum import LinearEinsum, linear_einsum
from flix.backends.tensorflow._layer import FlixLayer, config_from
from flix.backends.tensorflow._ops import routed_embedding, routed_linear
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import TargetError

_register = keras.saving.register_keras_serializable(package="flix")


@_register
class FlixDense(FlixLayer, layers.Dense):  # type: ignore[misc]
    """A frozen Dense layer plus each row's sum of low-rank updates, before the activation (docs/specification.md §1.1).

    In a model, ``adapt`` turns the targets into this class. By hand::

        layer = FlixDense(768, config=config, name="q")
        y = layer(x, flix_features=ids, flix_weights=None)

    Args:
        units: d_out.
        config: the configuration; its ranks and seed are used.
        path: the layer's path, which ranks, initial values and messages go by; default: its name.
        strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        frozen: ids of features that do not train.
        kwargs: Dense's.

    Raises:
        ConfigError: no configuration, or an unknown strategy.
    """

    flix_base = layers.Dense

    def __init__(
        self,
        units: int,
        *,
        config: FlixConfig | dict[str, Any],
        path: str | None = None,
        strategy: str = "auto",
        frozen: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> None:
        layers.Dense.__init__(self, units, **kwargs)
        self.describe(config_from(config), path or self.name, strategy, tuple(frozen))

    @staticmethod
    def sizes_of(layer: Any) -> tuple[int, int]:
        """(d_in, d_out) of a Dense layer, adapted or not."""
        return int(layer._kernel.shape[0]), int(layer._kernel.shape[1])

    def call(
        self, inputs: Any, flix_features: Any = None, flix_weights: Any = None, training: Any = None
    ) -> Any:
        """The adapted map.

        Args:
            inputs: ``[B, ..., d_in]``.
            flix_features: int ``[B, W]`` or ``[B, T, W]``; default: the routing in force.
            flix_weights: float in that shape; default 1.
            training: whether the layer trains; without routing, that is an error.

        Returns:
            ``[B, ..., units]``.

        Raises:
            RoutingError: no routing in training, or routing that does not fit the inputs.
        """
        routing = self._routing(flix_features, flix_weights, training)
        if routing is None:
            return layers.Dense.call(self, inputs)
        given = inputs.shape.as_list()[:-1]
        strategy = self._strategy_for(routing, given)
        x, count, length = self._grouped(inputs, routing, trailing=1)
        base = ops.matmul(x, self.kernel)
        if self.bias is not None:
            base = ops.add(base, self.bias)
        y = routed_linear(
            tf.reshape(x, [count, length, self.d_in]),
            tf.reshape(base, [count, length, self.d_out]),
            routing.plan(self.flix_layout, self.flix_A.dtype),
            (self.flix_A.value, self.flix_B.value),
            strategy,
            self.flix_live,
        )
        y = tf.reshape(y, tf.shape(base))
        y.set_shape(base.shape)
        return y if self.activation is None else self.activation(y)


@_register
class FlixEinsumDense(FlixLayer, layers.EinsumDense):  # type: ignore[misc]
    """A frozen EinsumDense layer plus each row's own sum of low-rank updates, before the activation.

    The kernel counts as a matrix ``[d_in, d_out]``: the axes that it shares with the input, in the kernel's order
    and flattened row by row, then the axes that it shares with the output, likewise. For attention's query
    ``"abc,cde->abde"`` that is ``[c, d * e]``, for its output ``"abcd,cde->abe"`` ``[c * d, e]``: heads first, as in
    other frameworks' two-dimensional kernels. Arguments as for :class:`FlixDense`.

    Raises:
        TargetError: an equation that is no linear map at every position.
    """

    flix_base = layers.EinsumDense

    def __init__(
        self,
        equation: str,
        output_shape: Any,
        *,
        config: FlixConfig | dict[str, Any],
        path: str | None = None,
        strategy: str = "auto",
        frozen: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> None:
        layers.EinsumDense.__init__(self, equation, output_shape, **kwargs)
        if isinstance(reason := linear_einsum(equation), str):
            raise TargetError(f"layer {self.name!r} cannot be adapted: {reason}")
        self.describe(config_from(config), path or self.name, strategy, tuple(frozen))

    @property
    def flix_map(self) -> LinearEinsum:
        """The equation as a linear map."""
        return _linear_einsum(self.equation)

    @staticmethod
    def sizes_of(layer: Any) -> tuple[int, int]:
        """(d_in, d_out) of an EinsumDense layer, adapted or not."""
        return _linear_einsum(layer.equation).sizes(tuple(layer._kernel.shape))

    def call(
        self, inputs: Any, flix_features: Any = None, flix_weights: Any = None, training: Any = None
    ) -> Any:
        """The adapted map; arguments as for :class:`FlixDense`."""
        routing = self._routing(flix_features, flix_weights, training)
        if routing is None:
            return layers.EinsumDense.call(self, inputs)
        equation = self.flix_map
        order = equation.input_order(inputs.shape.rank)
        positions = inputs.shape.rank - len(equation.contracted)
        x = inputs if order == sorted(order) else tf.transpose(inputs, order)
        strategy = self._strategy_for(routing, x.shape.as_list()[:positions])
        x, count, length = self._grouped(x, routing, trailing=len(equation.contracted))
        lead = tf.shape(x)[:positions]
        kernel = tf.transpose(self.kernel, equation.kernel_order)
        made = [kernel.shape[len(equation.contracted) + i] for i in range(len(equation.made))]
        x = tf.reshape(x, [count, length, self.d_in])
        base = tf.reshape(
            tf.matmul(
                tf.reshape(x, [count * length, self.d_in]),
                tf.reshape(kernel, [self.d_in, self.d_out]),
            ),
            [count, length, self.d_out],
        )
        y = routed_linear(
            x,
            base,
            routing.plan(self.flix_layout, self.flix_A.dtype),
            (self.flix_A.value, self.flix_B.value),
            strategy,
            self.flix_live,
        )
        y = tf.reshape(y, tf.concat([lead, made], 0))
        order = equation.output_order(positions + len(made), inputs.shape.rank)
        y = y if order == sorted(order) else tf.transpose(y, order)
        if self.bias is not None:
            y = ops.add(y, self.bias)
        return y if self.activation is None else self.activation(y)


@_register
class FlixEmbedding(FlixLayer, layers.Embedding):  # type: ignore[misc]
    """A frozen embedding plus each row's own sum: y = E0[t] + Σ w s B_f A_f[:, t] (docs/specification.md §1.1).

    By hand: ``FlixEmbedding(vocabulary, size, config=config, name="embed")``, called as :class:`FlixDense`.
    """

    flix_kind = "embedding"
    flix_base = layers.Embedding

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        config: FlixConfig | dict[str, Any],
        path: str | None = None,
        strategy: str = "auto",
        frozen: tuple[int, ...] = (),
        weights: Any = None,
        **kwargs: Any,
    ) -> None:
        layers.Embedding.__init__(self, input_dim, output_dim, **kwargs)
        self.describe(config_from(config), path or self.name, strategy, tuple(frozen))
        if weights is not None:
            self.build()
            self._embeddings.assign(weights[0] if isinstance(weights, list) else weights)

    @staticmethod
    def sizes_of(layer: Any) -> tuple[int, int]:
        """(vocabulary, d_out) of an Embedding layer, adapted or not."""
        return int(layer.input_dim), int(layer.output_dim)

    def call(
        self, inputs: Any, flix_features: Any = None, flix_weights: Any = None, training: Any = None
    ) -> Any:
        """The adapted lookup: token ids ``[B, ...]`` to ``[B, ..., d_out]``; otherwise as FlixDense's."""
        routing = self._routing(flix_features, flix_weights, training)
        if routing is None:
            return layers.Embedding.call(self, inputs)
        strategy = self._strategy_for(routing, inputs.shape.as_list())
        x, count, length = self._grouped(inputs, routing, trailing=0)
        base = layers.Embedding.call(self, x)
        y = routed_embedding(
            tf.reshape(tf.cast(x, tf.int32), [count, length]),
            tf.reshape(base, [count, length, self.d_out]),
            routing.plan(self.flix_layout, self.flix_A.dtype),
            (self.flix_A.value, self.flix_B.value),
            strategy,
            self.flix_live,
        )
        y = tf.reshape(y, tf.shape(base))
        y.set_shape(base.shape)
        return y

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras's hook."""
        return layers.Embedding.compute_output_spec(self, inputs)


@functools.cache
def _linear_einsum(equation: str) -> LinearEinsum:
    found = linear_einsum(equation)
    if isinstance(found, str):
        raise TargetError(found)
    return found


def adaptable(layer: Any) -> tuple[type[Any] | None, str]:
    """The class that an unadapted layer becomes, or None with the reason (empty for other kinds of layers)."""
    if isinstance(layer, FlixLayer):
        return None, "it is adapted already"
    for target in (FlixDense, FlixEinsumDense, FlixEmbedding):
        base = target.flix_base
        if not isinstance(layer, base):
            continue
        if type(layer) is not base:
            return None, f"its class {type(layer).__name__} may have a call of its own"
        if getattr(layer, "lora_enabled", False):
            return None, "it has a LoRA of its own (enable_lora)"
        if layer.quantization_mode is not None:
            return None, f"it is quantized ({layer.quantization_mode})"
        if not layer.built:
            return None, "it is not built yet; call the model on a batch first"
        if target is FlixEinsumDense and isinstance(found := linear_einsum(layer.equation), str):
            return None, found
        return target, ""
    return None, ""


def become(
    layer: Any,
    config: FlixConfig,
    path: str,
    strategy: str,
    frozen: tuple[int, ...] = (),
    layout: LayerLayout | None = None,
) -> None:
    """Turn a built plain layer into its adapted class, in place: graphs, attributes and sharing stay as they are."""
    target, reason = adaptable(layer)
    if target is None:
        raise TargetError(f"layer {path!r} cannot be adapted: {reason or type(layer).__name__}")
    _switch(layer, target)
    layer.describe(config, path, strategy, frozen, layout)
    layer._trainable = True
    layer.attach()


def revert(layer: Any) -> None:
    """Turn an adapted layer back into the plain layer it was, in place; its features are gone."""
    for name in ("flix_A", "flix_B"):
        if getattr(layer, name) is not None:
            layer._untrack_variable(getattr(layer, name))
    for name in [key for key in vars(layer) if key.startswith("flix_")]:
        delattr(layer, name)
    _switch(layer, type(layer).flix_base)


def _switch(layer: Any, cls: type[Any]) -> None:
    """Give a layer another class; Keras keeps what it found out about the call's signature on the instance."""
    layer.__class__ = cls
    layer._call_signature = inspect.signature(layer.call)
    names = list(layer._call_signature.parameters)
    layer.call_signature_parameters = names
    layer._call_has_training_arg = "training" in names
    layer._call_has_mask_arg = "mask" in names
    layer._call_has_context_arg = {arg: arg in names for arg in layer._call_context_args}
