"""Adapters out of models and into them."""

from __future__ import annotations

from typing import Any, TypeVar

from numpy.typing import NDArray

from flix.backends.verbs.shared import Shared, by_layer, layer_pairs, named
from flix.core.adapter.adapter import Adapter, Rename
from flix.core.adapter.compatibility import check_same
from flix.core.adapter.files import save_adapter, save_pairs, stored_adapter
from flix.core.adapter.sharing import select_features
from flix.core.files import Path_
from flix.core.strategy.decide import check_strategy

M = TypeVar("M")


class Files(Shared):
    """Verbs about adapters."""

    def to_adapter(self, model: Any) -> Adapter:
        """The model's features as a numpy :class:`flix.Adapter`; values are copied.

        Raises:
            TargetError: the model is not adapted.
        """
        self.config_of("to_adapter", model)
        return self.adapter_of(model, copy=True)

    def named_pairs(self, model: Any) -> dict[str, NDArray[Any]]:
        """The features' values under the names that adapter files use: ``<path>.A.<group>.<feature>``; copies.

        Raises:
            TargetError: the model is not adapted.
        """
        self.config_of("named_pairs", model)
        return {name: value.copy() for name, value in named(self.primitives.read(model)).items()}

    def save(self, model: Any, directory: Path_, features: Any = None) -> None:
        """Write the model's adapter as a folder; the base is not written.

        Parameters of the base that were unfrozen, such as a classifier head, go with it where the backend offers heads
        (torch does).

        Args:
            model: an adapted model.
            directory: the folder.
            features: ``[(group, name), ...]`` or ``{group: name or names}``: these alone, and what they imply, without
                heads; default: all. ``load_features`` takes them into another model.

        Raises:
            FeatureError: an unknown feature.
            TargetError: the model is not adapted.
            AdapterError: the path is a file.
        """
        config = self.config_of("save", model)
        heads = self.heads()
        if features is None:
            primitives = self.primitives
            save_pairs(config, primitives.shapes(model), primitives.read(model), directory)
            if heads is not None:
                heads.save_heads(model, directory)
            return
        save_adapter(select_features(self.adapter_of(model), features), directory)
        if heads is not None:
            heads.remove_heads(directory)

    def load(
        self, model: M, directory: Path_, rename: Rename = None, *, strategy: str = "auto"
    ) -> M:
        """Load an adapter into a model.

        A plain model is adapted with the file's configuration, exactly in the file's layers; an adapted one must have
        the same layers, features and ranks, and gets the file's values. Heads that were trained with the adapter get
        their values, too, and require gradients, as they did.

        Args:
            model: a plain or adapted model.
            directory: the adapter's folder.
            rename: translates the file's layer paths to the model's.
            strategy: as for ``adapt``, for a plain model.

        Returns:
            The adapted model.

        Raises:
            AdapterError: a damaged file, or one for another architecture (the first mismatching layer is named).
            TargetError: a model that cannot be adapted.
        """
        with stored_adapter(directory, rename) as adapter:
            heads = self.heads()
            if heads is None:
                return self.load_into(model, adapter, strategy=strategy)
            self.check_fits(adapter, model)  # layers are named before heads are
            found = heads.read_heads(model, directory, rename)
            model = self.load_into(model, adapter, strategy=strategy)
            heads.put_heads(model, found)
            return model

    def load_into(self, model: M, adapter: Adapter, *, strategy: str = "auto") -> M:
        """Put a numpy adapter into a model; otherwise as ``load``."""
        check_strategy(strategy)
        config = self.primitives.adapted(model)
        if config is None:
            self.check_plain(model)
            self.check_fits(adapter, model)
            return self.primitives.attach(
                model,
                adapter.config,
                list(adapter.layers),
                strategy,
                lambda path, _: layer_pairs(adapter, path),
            )
        self.check_fits(adapter, model)
        layouts = {path: config.layout(path) for path in self.primitives.shapes(model)}
        check_same(adapter, config, layouts)
        return self.primitives.write(model, by_layer(adapter))
