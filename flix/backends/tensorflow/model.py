"""Adapting Keras models: targets become adapted layers, a model around takes routing (docs/specification.md §5.4)."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf

from flix.backends.tensorflow import _remat
from flix.backends.tensorflow._base import (
    FEATURES,
    INPUTS,
    WEIGHTS,
    flix_layers,
    forget_traces,
    layer_infos,
    plain,
    set_trainable_flags,
    specs_of,
    split_inputs,
    symbolic_inputs,
    trainable_flags,
)
from flix.backends.tensorflow._context import activated, current, host_values, make_routing
from flix.backends.tensorflow._layer import config_from
from flix.backends.tensorflow._paths import named_layers
from flix.backends.tensorflow.layers import become
from flix.backends.tensorflow.optimizers import keep_absent
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.config.targets import select
from flix.core.errors import ConfigError, RoutingError, TargetError
from flix.core.features.routing import Routing
from flix.core.strategy.decide import check_strategy


@keras.saving.register_keras_serializable(package="flix")
class FlixModel(keras.Model):  # type: ignore[misc]
    """An adapted model: the base model, called with routing beside its inputs.

    It is called with a dictionary (a Keras model drops tensors passed as keywords when it is built from symbols)::

        model({"inputs": x, "flix_features": ids})                       # ids int [B, W] or [B, T, W]
        model({"inputs": x, "flix_features": ids, "flix_weights": w})
        model({"tokens": t, "positions": p, "flix_features": ids})       # the base's own named inputs

    ``fit``, ``evaluate``, ``predict``, ``save("m.keras")`` and ``export`` work as for any model; ``compile`` sees to it
    that the optimizer moves only the features of the batch (:func:`~flix.backends.tensorflow.keep_absent`).

    Attributes:
        base: the model that was adapted.
        flix_config: the configuration.
        flix_enabled: False while the model is disabled.
    """

    flix_enabled = True

    def __init__(self, base: Any, config: FlixConfig, **kwargs: Any) -> None:
        super().__init__(dtype=kwargs.pop("dtype", base.dtype_policy), **kwargs)
        _remat.install()
        self.base = base
        self.flix_config = config
        self.flix_flags = ""  # which layers were trainable before the base was frozen
        self.flix_specs: Any = None
        self.autocast = False
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        """The base is built already."""

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """keras.Model's call; routing may also be a :class:`flix.Routing` or a nested list."""
        if isinstance(inputs, dict):
            inputs = self._with_arrays(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def _with_arrays(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keras takes tensors and arrays alone: routing in other forms, as arrays."""
        given = dict(inputs)
        if not self.flix_enabled:  # routing is not looked at
            return {name: x for name, x in given.items() if name not in (FEATURES, WEIGHTS)}
        routing = given.get(FEATURES)
        if isinstance(routing, Routing):
            make_routing(self.flix_config.registry, routing)  # refuses another registry's
            given[FEATURES] = routing.ids
            given.setdefault(WEIGHTS, routing.weights)
        for name in (FEATURES, WEIGHTS):
            if isinstance(given.get(name), list):
                given[name] = host_values(given[name], name)
            if name in given and given[name] is None:
                del given[name]
        return given

    @property
    def trainable(self) -> bool:
        """Whether the model trains at all; the base stays frozen either way."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)

    def compile(self, *args: Any, jit_compile: Any = "auto", **kwargs: Any) -> None:
        """keras.Model.compile, with an optimizer that leaves absent features as they are.

        ``jit_compile="auto"`` means without XLA here, which writes a whole variable where some rows are updated.
        """
        jit = False if jit_compile == "auto" else jit_compile
        super().compile(*args, jit_compile=jit, **kwargs)
        if self.optimizer is not None:
            keep_absent(self.optimizer, whole=bool(jit))

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Keras's hook. Under a distribution strategy it gets the mean of the replicas' batches, so floats for ids."""

        def whole(path: tuple[Any, ...], x: Any) -> Any:
            return tf.cast(x, tf.int32) if FEATURES in path else x

        if data_batch is not None:
            flat = [whole(path, x) for path, x in keras.tree.flatten_with_path(data_batch)]
            data_batch = keras.tree.pack_sequence_as(data_batch, flat)
        super()._symbolic_build(iterator=iterator, data_batch=data_batch)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Keras's hook: compile as the saved model was."""
        if config:
            self.compile(**keras.saving.deserialize_keras_object(config))
            if self.optimizer is not None:
                self.optimizer.build(self.trainable_variables)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """The base model's output, each row under its own composition.

        Args:
            inputs: a dictionary with ``"flix_features"``, perhaps ``"flix_weights"``, and either ``"inputs"`` or
                the base's own named inputs. Anything else is the base's input, without routing.
            training: whether the model trains.

        Raises:
            RoutingError: no routing in training, or routing that breaks a rule; the row is named.
        """
        own, features, weights = split_inputs(inputs, self.base)
        leaves = [x for x in keras.tree.flatten(own) if x is not None]
        if self.flix_specs is None:
            self.flix_specs = specs_of(own)
        if not self.flix_enabled:
            return self.base(own)
        if features is None:
            self._check_unrouted(weights, training)
            return self.base(own)
        routing = make_routing(
            self.flix_config.registry,
            features,
            weights,
            batch=leaves[0].shape[0] if leaves and leaves[0].shape.rank else None,
            lengths=[x.shape[1] or tf.shape(x)[1] for x in leaves if (x.shape.rank or 0) >= 2],
        )
        with activated(routing):
            return self.base(own)

    def _check_unrouted(self, weights: Any, training: Any) -> None:
        if weights is not None:
            raise RoutingError(
                "flix_weights was given without flix_features; weights belong to ids"
            )
        if current.routing is not None:
            return
        if training:
            raise RoutingError(
                "an adapted model was called in training without routing; call it with "
                '{"inputs": x, "flix_features": ids}, ids int [batch, width] made by '
                "registry.encode(rows) (ids of -1 for rows of the base alone)"
            )
        warnings.warn(
            "an adapted model was called without flix_features: the base model answers alone. Pass "
            '{"inputs": x, "flix_features": ids}, or ids of -1 if this is meant',
            stacklevel=3,
        )

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """The base's layers pass their masks on themselves."""

    def export(
        self,
        filepath: str,
        format: str = "tf_saved_model",
        input_signature: Any = None,
        **kwargs: Any,
    ) -> Any:
        """keras.Model.export; the default serving signature takes ``flix_features`` beside the base's inputs.

        Raises:
            TargetError: a base that is neither functional nor has been called, so that its inputs are not known.
        """
        if input_signature is None:
            input_signature = [self.input_specs()]
        return super().export(filepath, format, input_signature=input_signature, **kwargs)

    def input_specs(self, weights: bool = False) -> dict[str, Any]:
        """What the model is called with, as ``tf.TensorSpec``: batches and widths of any size.

        Args:
            weights: with ``flix_weights``.

        Raises:
            TargetError: a base that is neither functional nor has been called.
        """
        struct = symbolic_inputs(self.base)
        own = self.flix_specs if struct is None else specs_of(struct)
        if own is None:
            raise TargetError(
                "the inputs of a subclassed model are known once it was called; call it on a batch, or "
                "give export an input_signature"
            )
        given = dict(own) if isinstance(own, dict) else {INPUTS: own}
        given[FEATURES] = tf.TensorSpec([None, None], tf.int32, name=FEATURES)
        if weights:
            given[WEIGHTS] = tf.TensorSpec([None, None], tf.float32, name=WEIGHTS)
        return given

    def get_config(self) -> dict[str, Any]:
        """Keras's hook: the plain base, and what it takes to adapt it again."""
        with plain(self.base):
            base = keras.saving.serialize_keras_object(self.base)
        layers = list(flix_layers(self.base))
        return {
            "name": self.name,
            "base": base,
            "config": self.flix_config.to_dict(),
            "paths": [path for path, _ in layers],
            "strategies": [layer.flix_strategy for _, layer in layers],
            "frozen": [list(layer.flix_frozen) for _, layer in layers],
            "flags": self.flix_flags,
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
        model = cls(base, config_from(config["config"]), name=config["name"])
        frozen = [tuple(ids) for ids in config["frozen"]]
        attach_layers(model, config["paths"], config["strategies"], frozen)
        model.flix_flags = config["flags"]
        set_trainable_flags(base, config["trainable"])
        return model


def adapt(model: Any, config: FlixConfig, *, strategy: str = "auto") -> FlixModel:
    """Adapt a Keras model: functional, sequential or subclassed.

    The targets among its Dense, EinsumDense and Embedding layers become adapted layers, in place; everything else is
    frozen (batch normalisation then keeps its statistics, as it does in any frozen Keras model). The model that comes
    back takes routing beside the inputs, see :class:`FlixModel`. Heads that are to be trained are unfrozen by hand
    afterwards: ``model.base.get_layer("head").trainable = True``.

    Layers go by dotted paths of their names; see :mod:`flix.backends.tensorflow._paths`.

    Args:
        model: a built Keras 3 model.
        config: the configuration.
        strategy: how the sum is computed: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.

    Raises:
        TargetError: patterns that match nothing or a layer that cannot be adapted; a model that is adapted already
            or not built.
        ConfigError: an unknown strategy.
    """
    if not isinstance(model, keras.Model):
        raise TargetError(f"adapt needs a keras.Model, got {type(model).__name__}")
    if not isinstance(config, FlixConfig):
        raise ConfigError(f"adapt needs a FlixConfig, got {type(config).__name__}")
    check_strategy(strategy)
    require_plain(model)
    chosen = select(layer_infos(model), config.target_modules, config.exclude_modules)
    return adapt_layers(model, config, [info.path for info in chosen], strategy)


def require_plain(model: Any) -> None:
    """Refuse a model that is adapted or not built.

    Raises:
        TargetError: it is.
    """
    if isinstance(model, FlixModel) or next(flix_layers(model), None) is not None:
        raise TargetError(
            "the model is adapted already; add features with add_feature, or adapt a fresh copy"
        )
    if not model.built:
        raise TargetError(
            f"{type(model).__name__} is not built yet, so its layers have no kernels; call it on a batch "
            "(or give it an Input) before it is adapted"
        )


def adapt_layers(
    model: Any, config: FlixConfig, paths: list[str], strategy: str = "auto"
) -> FlixModel:
    """Adapt exactly these layers of a plain model."""
    adapted = FlixModel(model, config, name=f"flix_{model.name}")
    adapted.flix_flags = trainable_flags(model)
    model.trainable = False
    attach_layers(adapted, paths, [strategy] * len(paths))
    return adapted


def attach_layers(
    model: FlixModel,
    paths: list[str],
    strategies: list[str],
    frozen: list[tuple[int, ...]] | None = None,
) -> None:
    """Turn the layers at these paths into adapted ones; equal layouts are one object."""
    layouts: dict[LayerLayout, LayerLayout] = {}
    layers = dict(named_layers(model.base))
    for i, path in enumerate(paths):
        if path not in layers:
            raise TargetError(f"the base model has no layer {path!r}")
        layout = model.flix_config.layout(path)
        layout = layouts.setdefault(layout, layout)
        off = frozen[i] if frozen else ()
        become(layers[path], model.flix_config, path, strategies[i], off, layout)
    forget_traces(model.base)


def require_adapted(model: Any, what: str) -> FlixConfig:
    """The configuration of an adapted model.

    Raises:
        TargetError: the model is not adapted.
    """
    if not isinstance(model, FlixModel):
        raise TargetError(
            f"{what} needs an adapted model, but this {type(model).__name__} is not; "
            "adapt(model, config) or load(model, folder) first"
        )
    config: FlixConfig = model.flix_config
    return config


__all__ = ["FlixModel", "adapt", "adapt_layers", "flix_layers", "require_adapted", "require_plain"]
