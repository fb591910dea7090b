"""Adapted layers: what Dense, EinsumDense and Embedding become (docs/specification.md §1.1, §5.4)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from flix.backends import messages
from flix.backends.keras import bypassed, quantised
from flix.backends.keras.bypassed import WatchedKernel
from flix.backends.keras.engine import BACKEND, engine
from flix.backends.keras.parameters import FlixState, Parameters, config_from
from flix.backends.keras.patches.saving import register
from flix.core.config.config import FlixConfig
from flix.core.config.kernels import Form, LinearEinsum, linear_einsum
from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError, TargetError
from flix.core.features.names import written
from flix.core.strategy.decide import decide, facts_of

_MANY = 1 << 20
"""Stands for a size that is not known while a graph is traced."""
Sizes = list[int | None]


class FlixLayer(Parameters):
    """How an adapted layer is made by hand, how routing reaches it, and how its input is fitted to the routing.

    Args:
        args: those of the plain layer.
        config: the configuration; its ranks and seed are used.
        path: the layer's path, which ranks, initial values and messages go by; default: its name.
        strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        frozen: ids of features that do not train.
        kwargs: those of the plain layer.

    Raises:
        ConfigError: no configuration, or an unknown strategy.
    """

    def __init__(
        self,
        *args: Any,
        config: FlixConfig | dict[str, Any],
        path: str | None = None,
        strategy: str = "auto",
        frozen: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        state = FlixState(config_from(config), tuple(frozen))
        self.describe(state, path or self.name, strategy)  # type: ignore[attr-defined]
        if self.built:  # type: ignore[attr-defined]  # an Embedding that was given its weights
            self.attach()

    def describe(
        self, state: FlixState, name: str, strategy: str, layout: LayerLayout | None = None
    ) -> None:
        """See :meth:`Parameters.describe`.

        Raises:
            ConfigError: a strategy that there is not, or not on this Keras backend.
        """
        if strategy in engine.REFUSED:
            raise ConfigError(f"Keras runs on {BACKEND}: {engine.REFUSED[strategy]}")
        super().describe(state, name, strategy, layout)

    def call(
        self, inputs: Any, flix_features: Any = None, flix_weights: Any = None, training: Any = None
    ) -> Any:
        """The adapted map.

        Args:
            inputs: ``[B, ..., d_in]``, sparse ones, too, or token ids ``[B, ...]``.
            flix_features: int ``[B, W]`` or ``[B, T, W]``; default: the routing in force.
            flix_weights: float in that shape; default 1.
            training: Keras's: whether ``lora_dropout`` acts; it goes to the forward of a quantised layer, too.

        Returns:
            ``[B, ..., d_out]``, in the plain layer's form.

        Raises:
            RoutingError: no routing, weights alone, routing of another registry, or routing that does not fit the
                inputs. A model that is disabled does not look at it.
        """
        if self.flix_kind == "linear":
            inputs = engine.dense(inputs)
        bypassed.ran(self)
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            if self.quantization_mode is not None:  # type: ignore[attr-defined]
                return self.flix_base.quantized_call(self, inputs, training=training)
            return self.flix_base.call(self, inputs)
        return self._routed(inputs, routing, training)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """Keras's hook, which it calls in the place of ``call`` where the layer was quantised."""
        return self.call(*args, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as :meth:`enable_lora` is: the layer would be called without its features from then on.

        Raises:
            TargetError: always.
        """
        raise messages.changed_kernel("quantize", f"layer {self.flix_name!r}")

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Refused; see :meth:`quantize`."""
        raise messages.changed_kernel("enable_lora", f"layer {self.flix_name!r}")

    def _routed(self, inputs: Any, routing: Any, training: Any) -> Any:
        """The adapted map under some routing."""
        raise NotImplementedError

    def _routing(self, features: Any, weights: Any) -> Any:
        """The routing to run under: the one given, or the one in force; None to run the base alone."""
        if engine.is_off(self.flix_state, self.flix_name):
            return None
        registry = self.flix_config.registry
        if features is not None:
            routing = engine.make_routing(registry, features, weights)
        elif weights is not None:
            raise messages.weights_alone()
        else:
            routing = engine.in_force(self.flix_name)
            if routing.registry is not registry and routing.registry != registry:
                raise messages.other_registry(self.flix_name, routing.registry, registry)
        return routing

    def _dropped(self, x: Any, training: bool) -> Any:
        """What the features see of a linear layer's input; in training, ``lora_dropout`` hides entries from them."""
        rate = self.flix_config.lora_dropout
        return keras.random.dropout(x, rate, seed=self.flix_seed) if rate and training else x

    def _sum(self, x: Any, base: Any, rows: tuple[Any, Any], routing: Any, strategy: str) -> Any:
        """base, in its own shape, plus what the features make of x: rows N of S positions, or of S token ids."""
        if self.flix_A is None:  # every rank is 0; the routing was held to the input all the same
            return base
        placed = routing.placed(self.flix_layout, self.flix_A.dtype)
        tables = tuple(t.value for t in (self.flix_A, self.flix_B, self.flix_use) if t is not None)
        tokens, shape = self.flix_kind == "embedding", self.layer_shape
        x = ops.cast(x, "int32") if tokens else x
        x = ops.reshape(x, rows if tokens else (*rows, shape.d_in))
        grouped = ops.reshape(base, (*rows, shape.d_out))
        routed = engine.routed_embedding if tokens else engine.routed_linear
        y = routed(x, grouped, placed, tables, strategy, self.flix_live)
        if engine.known_broken(y):
            self._name_broken(np.unique(routing.ids))
        return engine.shaped(y, base)

    def _name_broken(self, ids: Any) -> None:
        """Warn, once for each, of features among these ids with values that are not finite."""
        registry, known = self.flix_config.registry, self.flix_state.broken
        held = self.values([i for i in ids.tolist() if 0 <= i < len(registry)])
        found = [i for i, pair in held.items() if not all(np.isfinite(v).all() for v in pair)]
        if fresh := [registry.features[i] for i in found if registry.features[i] not in known]:
            known.update(fresh)
            warnings.warn(
                messages.not_finite([written(feature) for feature in fresh]), stacklevel=2
            )

    def _strategy_for(self, routing: Any, given: Sizes) -> str:
        """The strategy for an input of these leading sizes, from shapes alone."""
        examples, total = _product(routing.lead), _product(given)
        if len(given) > len(routing.lead):
            positions = _product(given[len(routing.lead) :])
        elif _MANY in (examples, total) or not examples:
            positions = 1
        else:  # more than 1 where the model flattened its input
            positions = total // examples
        facts = facts_of(
            self.flix_layout, routing.ids.shape[-1], examples, positions, engine.DEVICE
        )
        strategy = decide(self.flix_strategy, facts).strategy
        if strategy == "single" and routing.unlike is not None:
            raise messages.rows_differ(routing.unlike)
        return strategy

    def _grouped(self, x: Any, routing: Any, trailing: int) -> tuple[Any, tuple[Any, Any], str]:
        """x with its leading dimensions fitted to the routing's rows.

        Args:
            x: ``[..., d_in]`` (trailing 1), or token ids ``[...]`` (trailing 0).
            routing: the routing in force.
            trailing: the number of dimensions of x that are not positions.

        Returns:
            x (repeated where it has one row for all); the rows N and the positions S a row; the strategy.

        Raises:
            RoutingError: the leading dimensions are not the routing's.
        """
        lead, given = routing.lead, engine.leading(x, trailing)
        strategy = self._strategy_for(routing, given)
        lengths = (1,) if len(lead) == 2 else routing.lengths
        x, rows = engine.grouped(x, routing, trailing, lengths, self.flix_name)
        return x, rows, strategy


@register
class FlixDense(FlixLayer, WatchedKernel, layers.Dense):  # type: ignore[misc]
    """A frozen Dense layer plus each row's sum of low-rank updates, before the activation (docs/specification.md §1.1).

    In a model, ``adapt`` turns the targets into this class. By hand::

        layer = FlixDense(768, config=config, name="q")
        y = layer(x, flix_features=ids, flix_weights=None)

    Arguments are those of :class:`FlixLayer`.
    """

    flix_base = layers.Dense

    def _routed(self, inputs: Any, routing: Any, training: Any) -> Any:
        x, rows, strategy = self._grouped(inputs, routing, trailing=1)
        if self.quantization_mode is not None:
            base = quantised.base_output(self, x, training)
        else:
            base = ops.matmul(x, self.kernel)
            if self.bias is not None:
                base = ops.add(base, self.bias)
        y = self._sum(self._dropped(x, training), base, rows, routing, strategy)
        return y if self.activation is None else self.activation(y)


@register
class FlixEinsumDense(FlixLayer, WatchedKernel, layers.EinsumDense):  # type: ignore[misc]
    """A frozen EinsumDense layer plus each row's own sum of low-rank updates, before the activation.

    The kernel counts as a matrix ``[d_in, d_out]``. First come the axes that it shares with the input, in the
    kernel's order and flattened row by row, and then, in the same way, the axes that it shares with the output. For
    the query of attention, ``"abc,cde->abde"``, that is ``[c, d * e]``, and for its output, ``"abcd,cde->abe"``, it
    is ``[c * d, e]``, with heads first, as in other frameworks' two-dimensional kernels. Arguments are those of
    :class:`FlixLayer`.

    Attributes:
        flix_map: the equation as a linear map.

    Raises:
        TargetError: an equation that is not a linear map at every position.
    """

    flix_base = layers.EinsumDense
    flix_map: LinearEinsum

    def describe(self, state: FlixState, name: str, *args: Any) -> None:
        """See :meth:`Parameters.describe`."""
        found = _linear_map(self.equation)
        if isinstance(found, str):
            raise TargetError(f"layer {name!r} cannot be adapted: {found}")
        self.flix_map = found
        super().describe(state, name, *args)

    @staticmethod
    def form_of(layer: Any) -> Form:
        """How the kernel of an EinsumDense layer with a linear equation, adapted or not, is a matrix."""
        found = getattr(layer, "flix_map", None) or linear_einsum(layer.equation)
        return found.form(quantised.kernel_shape(layer))  # type: ignore[no-any-return,union-attr]

    def _routed(self, inputs: Any, routing: Any, training: Any) -> Any:
        form, rank = self.form_of(self), len(inputs.shape)
        positions = rank - len(form.contracted)
        order = self.flix_map.input_order(rank)
        x = _transposed(inputs, order)
        x, rows, strategy = self._grouped(x, routing, len(form.contracted))
        lead = engine.sizes(x)[:positions]
        back = self.flix_map.output_order(positions + len(form.sizes))
        own = self.quantization_mode is not None
        if own:
            base = quantised.base_output(self, _transposed(x, _inverse(order)), training)
            base = ops.reshape(_transposed(base, _inverse(back)), (rows[0] * rows[1], form.d_out))
        x = ops.reshape(x, (rows[0] * rows[1], form.d_in))
        if not own:
            kernel = ops.transpose(self.kernel, form.order)
            base = ops.matmul(x, ops.reshape(kernel, (form.d_in, form.d_out)))
        y = self._sum(self._dropped(x, training), base, rows, routing, strategy)
        y = _transposed(ops.reshape(y, (*lead, *form.sizes)), back)
        if self.bias is not None and not own:
            y = ops.add(y, self.bias)
        return y if self.activation is None else self.activation(y)


@register
class FlixEmbedding(FlixLayer, layers.Embedding):  # type: ignore[misc]
    """A frozen embedding plus each row's own sum: y = E0[t] + Σ w s B_f A_f[:, t] (docs/specification.md §1.1).

    By hand: ``FlixEmbedding(vocabulary, size, config=config, name="embed")``, called as :class:`FlixDense`.
    """

    flix_kind = "embedding"
    flix_base = layers.Embedding

    def _routed(self, inputs: Any, routing: Any, training: Any) -> Any:
        x, rows, strategy = self._grouped(inputs, routing, trailing=0)
        if self.quantization_mode is not None:
            base = quantised.base_output(self, x, training)
        else:
            base = layers.Embedding.call(self, x)
        return self._sum(x, base, rows, routing, strategy)

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras's hook."""
        return layers.Embedding.compute_output_spec(self, inputs)


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
        if layer.quantization_mode not in (None, *quantised.MODES):
            return None, f"it is quantized ({layer.quantization_mode})"
        if not layer.built:
            return None, "it is not built yet; call the model on a batch first"
        if target is FlixEinsumDense and isinstance(found := _linear_map(layer.equation), str):
            return None, found
        return target, ""
    return None, ""


def _linear_map(equation: str) -> LinearEinsum | str:
    """The equation as a linear map of each row of a batch, or the reason why it is none."""
    found = linear_einsum(equation)
    if isinstance(found, str) or found.batch_first:
        return found
    return f"its equation {equation!r} has no batch as its first axis"


def _transposed(x: Any, order: list[int]) -> Any:
    return x if order == sorted(order) else ops.transpose(x, order)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _product(sizes: Sizes) -> int:
    return _MANY if None in sizes else min(math.prod(sizes), _MANY)  # type: ignore[arg-type]
