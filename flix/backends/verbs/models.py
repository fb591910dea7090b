"""Models become adapted; what of them trains, what they have, and their base alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from flix.backends.verbs.shared import Shared
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.changes import fresh_pairs
from flix.core.adapter.sharing import chosen_features
from flix.core.adapter.summary import Summary
from flix.core.config.config import FlixConfig
from flix.core.config.targets import left_out, select
from flix.core.errors import ConfigError
from flix.core.strategy.decide import check_strategy

M = TypeVar("M")


class Models(Shared):
    """Verbs about a model as a whole."""

    def adapt(self, model: M, config: FlixConfig, *, strategy: str = "auto") -> M:
        """Adapt a model. Its targets get the features, everything else is frozen, and its call takes routing::

            model(**batch, flix_features=ids, flix_weights=None)              # torch
            model(x, flix_features=ids, flix_weights=None)                    # flax.nnx
            model({"inputs": x, "flix_features": ids, "flix_weights": w})     # Keras

        ids is int ``[B, W]`` or, for packed rows, ``[B, T, W]``, weights float in that shape (default 1). The model
        is changed in place and stays an instance of its class; copies of it work. A Keras model gets a ``FlixModel``
        around it. To train heads, unfreeze them by hand afterwards.

        Args:
            model: a plain model with targets among its layers: ``nn.Linear``, Conv1D and ``nn.Embedding`` in torch,
                convolutions if you name them;
                Linear, LinearGeneral, Einsum and Embed in flax.nnx; Dense, EinsumDense and Embedding in Keras.
            config: the configuration.
            strategy: how the sums are computed: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.

        Returns:
            The adapted model.

        Raises:
            TargetError: patterns that match nothing, or match a layer that cannot be adapted; a model that is already
                adapted, not built, or wrapped.
            ConfigError: an unknown strategy, or one that cannot run here; ``lora_dropout`` for a layer that does not
                support it.
        """
        if not isinstance(config, FlixConfig):
            raise ConfigError(
                f"adapt needs a FlixConfig, got {type(config).__name__}; FlixConfig(registry=flix.FeatureRegistry({{group: "
                "names}), ranks=8) makes one"
            )
        check_strategy(strategy)
        self.check_plain(model)
        infos = self.primitives.layers(model) or ()
        chosen = select(infos, config.target_modules, config.exclude_modules)
        if said := left_out(infos, config.target_modules, config.exclude_modules):
            warnings.warn(
                f"'all-linear' leaves out {said}; name it in exclude_modules if that is meant",
                stacklevel=2,
            )

        layers = {info.path: LayerShape.told(info) for info in chosen}
        if error := self.undropped(config, layers):
            raise error
        paths = [*layers]
        return self.primitives.attach(model, config, paths, strategy, partial(fresh_pairs, config))

    def freeze(self, model: M, features: Any) -> M:
        """Stop these features of an adapted model from training; the others stay as they are.

        No optimizer moves a frozen feature, and the state of an optimizer stays valid.

        Args:
            model: an adapted model.
            features: ``[(group, name), ...]`` or ``{group: name or names}``.

        Returns:
            The model.

        Raises:
            FeatureError: an unknown feature.
            TargetError: the model is not adapted.
        """
        registry = self.config_of("freeze", model).registry
        chosen = chosen_features(registry, features)
        return self.primitives.set_frozen(model, {*self.primitives.frozen(model), *chosen})

    def thaw(self, model: M, features: Any = None) -> M:
        """Let these features of an adapted model train again; default: all. Otherwise as ``freeze``."""
        registry = self.config_of("thaw", model).registry
        chosen = registry.live if features is None else chosen_features(registry, features)
        return self.primitives.set_frozen(model, {*self.primitives.frozen(model)} - {*chosen})

    def trainable_parameters(self, model: Any) -> Any:
        """Everything that trains, to pass to an optimizer: a list of parameters in torch, of variables in Keras, and
        an ``nnx.State`` in JAX.

        Raises:
            TargetError: the model is not adapted.
        """
        self.config_of("trainable_parameters", model)
        return self.primitives.parameters(model)

    def summary(self, model: Any) -> Summary:
        """Layers, ranks and parameter counts of an adapted model; ``print(summary(model))``.

        Removed features are not counted (docs/specification.md §5.1.8); frozen ones count only in the total.

        Raises:
            TargetError: the model is not adapted.
        """
        config = self.config_of("summary", model)
        shapes, frozen = self.primitives.shapes(model), set(self.primitives.frozen(model))
        sizes = dict.fromkeys(config.registry.live, 0)
        for path, shape in shapes.items():
            for feature in sizes:
                sizes[feature] += shape.parameters(config.rank(path, feature))
        others = self.primitives.count(model)
        return Summary(
            layers=tuple(shapes),
            total=others.total + sum(sizes.values()),
            trainable=others.trainable + sum(n for f, n in sizes.items() if f not in frozen),
            features=sizes,
            ranks={f: int(config.ranks[f]) for f in sizes},  # type: ignore[index]
        )

    @contextmanager
    def disable(self, model: Any) -> Iterator[None]:
        """Inside, an adapted model is its base, whatever routing a call passes (docs/specification.md §5.1.3).

        It applies to the thread or asyncio task that entered it, and to what that starts as tasks or with
        ``asyncio.to_thread``. Contexts may nest, overlap and close in any order.

        Raises:
            TargetError: the model is not adapted.
        """
        self.config_of("disable", model)
        self.primitives.switch(model, 1)
        try:
            yield
        finally:
            self.primitives.switch(model, -1)
