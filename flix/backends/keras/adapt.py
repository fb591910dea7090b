"""Adapting Keras models: targets become adapted layers, a model around takes routing (docs/specification.md §5.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from flix.backends import messages
from flix.backends.keras import bypassed, quantised
from flix.backends.keras.base import forget_traces, set_trainable_flags, specs_of, trainable_flags
from flix.backends.keras.engine import engine
from flix.backends.keras.inputs import CALL, FEATURES, WEIGHTS, split_inputs
from flix.backends.keras.optimizers import keep_absent
from flix.backends.keras.parameters import FlixState, by_id, config_from
from flix.backends.keras.patches import remat
from flix.backends.keras.patches.classes import become, plain
from flix.backends.keras.patches.saving import register
from flix.backends.keras.paths import flix_layers, named_layers
from flix.backends.protocol import Values
from flix.core.config.config import FlixConfig
from flix.core.errors import TargetError
from flix.core.features.routing import unpacked


def _by_state(name: str) -> Any:
    """What Keras compiles of a model, apart for calls where the model is off."""

    def get(model: Any) -> Any:
        return vars(model).get("flix_functions", {}).get((name, _off(model)))

    def put(model: Any, function: Any) -> None:
        vars(model).setdefault("flix_functions", {})[name, _off(model)] = function

    return property(
        get,
        put,
        doc=f"Keras's ``{name}``: None until it is compiled; a separate one while it is disabled.",
    )


def _off(model: Any) -> bool:
    state = vars(model).get("flix_state")  # missing while the model is made
    return state is not None and engine.current.is_off(state)


@register
class FlixModel(engine.Extras, keras.Model):  # type: ignore[misc,name-defined]
    """An adapted model: the base model, called with routing in addition to its inputs.

    Call it with a dictionary, because a Keras model that is built from symbols drops tensors passed as keywords::

        model({"inputs": x, "flix_features": ids})                       # ids int [B, W] or [B, T, W]
        model({"inputs": x, "flix_features": ids, "flix_weights": w})
        model({"tokens": t, "positions": p, "flix_features": ids})       # the base's own named inputs

    ``fit``, ``evaluate``, ``predict``, ``save("m.keras")`` and ``export`` work as for any model; ``compile`` makes
    the optimizer move only the features of the batch (:func:`~flix.backends.tensorflow.keep_absent`).

    Attributes:
        base: the model that was adapted.
        flix_state: what flix stores on the model; its layers share it.
    """

    def __init__(self, base: Any, config: FlixConfig, **kwargs: Any) -> None:
        super().__init__(dtype=kwargs.pop("dtype", base.dtype_policy), **kwargs)
        self.flix_state = FlixState(config)
        remat.install()
        engine.install(base, self.flix_state)
        self.base = base
        self.autocast = False
        self.supports_jit = engine.compiled("auto")  # before compile, and in a model around
        self.built = True

    train_function = _by_state("train_function")
    test_function = _by_state("test_function")
    predict_function = _by_state("predict_function")

    @property
    def flix_config(self) -> FlixConfig:
        """The configuration."""
        return self.flix_state.config  # type: ignore[no-any-return]

    @property
    def output_names(self) -> Any:
        """The base's output names, for losses and metrics by name; missing if the base has none."""
        return self.base.output_names

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            TargetError: always; merge the model first, or quantize the base before it is adapted.
        """
        raise messages.changed_kernel("quantize", f"model {self.name!r}")

    def build(self, input_shape: Any = None) -> None:
        """Does nothing, because the base is already built."""

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """keras.Model's call; routing may also be a :class:`flix.Routing` or a nested list."""
        if isinstance(inputs, dict):
            given = {name: x for name, x in inputs.items() if name not in (FEATURES, WEIGHTS)}
            if not engine.current.is_off(self.flix_state):  # routing is not looked at there
                given.update(self._as_arrays(inputs.get(FEATURES), inputs.get(WEIGHTS)))
            inputs = given
        return super().__call__(inputs, *args, **kwargs)

    def _as_arrays(self, ids: Any, weights: Any) -> dict[str, Any]:
        """Routing as Keras takes it: in tensors and arrays alone."""
        ids, weights = unpacked(self.flix_config.registry, ids, weights)
        return {
            name: engine.host_values(name, value) if isinstance(value, list) else value
            for name, value in ((FEATURES, ids), (WEIGHTS, weights))
            if value is not None
        }

    @property
    def trainable(self) -> bool:
        """Whether the model trains at all; the base stays frozen either way."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)

    def compile(self, *args: Any, jit_compile: Any = "auto", **kwargs: Any) -> None:
        """keras.Model.compile, with an optimizer that leaves absent features as they are.

        ``jit_compile="auto"`` uses JAX's compiler but not TensorFlow's, which writes a whole variable to update some
        rows.

        Raises:
            ConfigError: ``jit_compile=True`` on torch, whose compiler loses the routing.
        """
        jit = engine.compiled(jit_compile)
        self.supports_jit = bool(jit)  # Keras would drop what was asked for
        super().compile(*args, jit_compile=jit, **kwargs)
        if self.optimizer is not None:
            keep_absent(self.optimizer, whole=bool(jit))

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Keras's hook: compile as the saved model was."""
        if config:
            self.compile(**keras.saving.deserialize_keras_object(config))
            if self.optimizer is not None:
                self.optimizer.build(self.trainable_variables)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """The base model's output, with each row's own composition.

        Args:
            inputs: a dictionary with ``"flix_features"``, optionally ``"flix_weights"``, and either ``"inputs"`` or
                the base's own named inputs. Anything else is the base's input; the routing then comes from ``route``.
            training: whether the model trains.

        Raises:
            RoutingError: no routing, or routing that breaks a rule; the error names the row.
        """
        own, features, weights = split_inputs(inputs, self.base)
        leaves = [x for x in keras.tree.flatten(own) if x is not None]
        state = self.flix_state
        if state.specs is None:
            state.specs = specs_of(own)
        if engine.is_off(state, self.name):
            return self.base(own)
        if features is None:
            if weights is not None:
                raise messages.weights_alone()
            if engine.current.routing is None:
                raise messages.unrouted_model(CALL)
            return self._watched(own, training)
        routing = engine.make_routing(
            self.flix_config.registry,
            features,
            weights,
            batch=leaves[0].shape[0] if leaves and engine.rank(leaves[0]) else None,
            lengths=[engine.length(x) for x in leaves if (engine.rank(x) or 0) >= 2],
        )
        with engine.current.under(routing=routing):
            return self._watched(own, training)

    def _watched(self, own: Any, training: Any) -> Any:
        return bypassed.run(self, own, training, lambda: flix_layers(self.base))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """None: the base's layers pass on their masks themselves."""

    def get_config(self) -> dict[str, Any]:
        """Keras's hook: the plain base, and what is needed to adapt it again."""
        layers = list(flix_layers(self.base))
        with plain(layer for _, layer in layers):
            base = keras.saving.serialize_keras_object(self.base)
        return {
            "name": self.name,
            "base": base,
            "config": self.flix_config.to_dict(),
            "paths": [path for path, _ in layers],
            "strategies": [layer.flix_strategy for _, layer in layers],
            "frozen": list(self.flix_state.frozen),
            "quantised": quantised.facts(named_layers(self.base)),
            "flags": self.flix_state.flags,
            "trainable": trainable_flags(self.base),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> FlixModel:
        """Keras's hook; see :meth:`get_config`.

        Raises:
            TargetError: the base cannot be built from its configuration.
        """
        base = keras.saving.deserialize_keras_object(config["base"], custom_objects=custom_objects)
        if not base.built:
            raise TargetError(
                f"{type(base).__name__} is not built after from_config; a subclassed model that is to be "
                "loaded needs build(), or to have been called on one batch before it was adapted"
            )
        quantised.restore(named_layers(base), config.get("quantised", {}))
        model = cls(base, config_from(config["config"]), name=config["name"])
        frozen = config["frozen"]
        if frozen and isinstance(frozen[0], list):  # files of before: a list for each layer
            frozen = frozen[0]
        model.flix_state.frozen, model.flix_state.flags = tuple(frozen), config["flags"]
        attach_layers(model, dict(zip(config["paths"], config["strategies"], strict=True)))
        set_trainable_flags(base, config["trainable"])
        return model


def attach(
    model: Any, config: FlixConfig, paths: Sequence[str], strategy: str, values: Values
) -> Any:
    """Put a model around a plain one, whose layers at these paths become adapted; the rest is frozen.

    Batch normalisation then keeps its statistics, as it does in any frozen Keras model. Heads that are to train are
    unfrozen by hand afterwards: ``model.base.get_layer("head").trainable = True``.
    """
    adapted = FlixModel(model, config, name=f"flix_{model.name}")
    adapted.flix_state.flags = trainable_flags(model)
    model.trainable = False

    attach_layers(adapted, dict.fromkeys(paths, strategy), values)
    return adapted


def attach_layers(
    model: FlixModel, strategies: Mapping[str, str], values: Values | None = None
) -> None:
    """Turn layers of the base into adapted ones.

    Args:
        model: the model around it.
        strategies: by path.
        values: a layer's pairs; default: initial values.

    Raises:
        TargetError: no such layer, or one that cannot be adapted.
    """
    state, layers = model.flix_state, dict(named_layers(model.base))
    for path, layout in state.config.layouts(strategies).items():
        if path not in layers:
            raise TargetError(f"the base model has no layer {path!r}")
        layer = layers[path]
        become(layer, path)
        layer.describe(state, path, strategies[path], layout)
        layer._trainable = True
        pairs = values and by_id(state.config.registry, values(path, layer.layer_shape))
        layer.attach(pairs)
    forget_traces(model)


__all__ = ["FlixModel"]
