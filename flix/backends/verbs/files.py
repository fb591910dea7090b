"""Adapters out of models and into them."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from numpy.typing import NDArray

from flix import hub
from flix.backends.protocol import SupportsHeads
from flix.backends.verbs.shared import Shared, by_layer, layer_pairs, named
from flix.core.adapter.adapter import Adapter, Rename
from flix.core.adapter.base import differing
from flix.core.adapter.compatibility import check_same
from flix.core.adapter.described import Head
from flix.core.adapter.files import save_adapter, save_pairs, stored_adapter
from flix.core.adapter.heads import check_head, check_heads, chosen_heads
from flix.core.adapter.sharing import select_features
from flix.core.errors import AdapterError, listed, warn
from flix.core.files import Path_
from flix.core.strategy.decide import check_strategy

M = TypeVar("M")


class Files(Shared):
    """Verbs about adapters."""

    def to_adapter(self, model: Any) -> Adapter:
        """The model's features as a numpy :class:`flix.Adapter`, without trained heads; values are copied.

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

    def save(
        self,
        model: Any,
        directory: Path_,
        features: Any = None,
        *,
        heads: Collection[str] | None = None,
    ) -> None:
        """Write the model's adapter as a folder, completely or not at all; the base is not written.

        Parameters of the base that you unfroze, such as a classifier head, are included. JAX does not know what a
        program trains, so name the heads once; later saves and loads remember them.

        Args:
            model: an adapted model.
            directory: the folder.
            features: write only these, ``[(group, name), ...]`` or ``{group: name or names}``, and the features that
                they imply, without heads; default: all. ``load_features`` adds them to another model.
            heads: the parameters, or modules, that were trained with the features; default: those that train, and those
                that were loaded or saved with the adapter before.

        Raises:
            FeatureError: an unknown feature.
            TargetError: the model is not adapted.
            AdapterError: the path is a file; a head that is not a parameter, or that is an adapted layer's kernel.
        """
        config = self.config_of("save", model)
        shapes = self.primitives.shapes(model)
        base = self.base_of(model, shapes)
        if features is not None:
            if heads:
                raise AdapterError(
                    "features= saves some features only; heads belong to all of them"
                )
            chosen = select_features(self.adapter_of(model), features)
            with self.writing(model) as mine:
                if mine:
                    save_adapter(replace(chosen, base=base), directory)
            return
        pairs, held = self.primitives.read(model), self._heads(model, heads)
        with self.writing(model) as mine:
            if mine:
                save_pairs(config, shapes, pairs, directory, held, base)

    def _heads(self, model: Any, names: Collection[str] | None) -> dict[str, Head]:
        """An adapted model's heads, checked."""
        if not self.offers(SupportsHeads):
            if names:
                raise AdapterError("heads: this backend has no parameters other than the features'")
            return {}
        layers = self.primitives.shapes(model)
        where = self.primitives.head_places(model)  # type: ignore[attr-defined]
        if names is not None:
            names = chosen_heads(where, names, layers)
        found: dict[str, Head] = dict(self.primitives.heads(model, names))  # type: ignore[attr-defined]
        for name in found:
            check_head(name, where[name], layers)
        return found

    def push(
        self,
        model: Any,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "",
        run: Mapping[str, Any] | None = None,
        heads: Collection[str] | None = None,
    ) -> str:
        """Push the model's adapter to a hub, with a card that describes it; needs the extra ``hub``.

        Args:
            model: an adapted model.
            name: ``org/name``; the repository is created if it does not exist.
            private: whether a new repository is private.
            revision: the branch; default: the main one.
            message: the commit message.
            run: what a run measured, as in its ``metrics.json``; the card shows the scores.
            heads: as for ``save``.

        Returns:
            The address of the commit; if several processes share a model, only in the one that writes.

        Raises:
            TargetError: the model is not adapted.
            AdapterError: an ill-formed name, or the hub refuses.
            MissingFrameworkError: ``huggingface_hub`` is not installed.
        """
        with tempfile.TemporaryDirectory() as aside:
            self.save(model, aside, heads=heads)
            with self.writing(model) as mine:
                if not mine:  # of several processes one pushes
                    return ""
                return hub.push(
                    aside, name, private=private, revision=revision, message=message, run=run
                )

    def load(
        self,
        model: M,
        directory: Path_,
        rename: Rename = None,
        *,
        strategy: str = "auto",
        heads: bool = True,
        revision: str | None = None,
    ) -> M:
        """Load an adapter into a model.

        A plain model is adapted with the file's configuration, in exactly the file's layers. An adapted model must
        have the same layers, features and ranks, and gets the file's values. Heads that were trained with the adapter
        also get their values, and require gradients as before. If the file says on which base the adapter was
        trained, and the model's adapted kernels have other values, a warning names both.

        Args:
            model: a plain or adapted model.
            directory: the adapter's folder, or its name on a hub, ``org/name`` (extra ``hub``).
            rename: translates the file's layer paths to the model's.
            strategy: as for ``adapt``, for a plain model.
            heads: False leaves out trained heads.
            revision: a branch, tag or commit of the hub.

        Returns:
            The adapted model.

        Raises:
            AdapterError: a damaged file, or one for another architecture (the first layer or head that does not fit
                is named); something that the hub does not have.
            TargetError: a model that cannot be adapted.
        """
        with stored_adapter(hub.place(directory, revision), rename) as adapter:
            return self.load_into(model, adapter, strategy=strategy, heads=heads)

    def load_into(
        self, model: M, adapter: Adapter, *, strategy: str = "auto", heads: bool = True
    ) -> M:
        """Load a numpy adapter into a model; otherwise as ``load``."""
        check_strategy(strategy)
        config = self.primitives.adapted(model)
        if config is None:
            self.check_plain(model)
        self.check_fits(adapter, model)  # layers are named before heads are
        placed = bool(adapter.heads) and heads
        if placed:
            self._check_heads(model, adapter)
        # Kernels are looked at only where the adapter says what they should be.
        if adapter.base is not None and (
            said := differing(adapter.base, self.base_of(model, adapter.layers))
        ):
            warn(said)
        if config is None:
            if error := self.undropped(adapter.config, adapter.layers):
                warn(
                    f"the adapter answers as before, but cannot be trained further as it was: "
                    f"{error}"
                )
            model = self.primitives.attach(
                model,
                adapter.config,
                list(adapter.layers),
                strategy,
                lambda path, _: layer_pairs(adapter, path),
            )
        else:
            layouts = {path: config.layout(path) for path in self.primitives.shapes(model)}
            check_same(adapter, config, layouts)
            model = self.primitives.write(model, by_layer(adapter))
        return self.primitives.put_heads(model, adapter.heads) if placed else model  # type: ignore[attr-defined, no-any-return]

    def _check_heads(self, model: Any, adapter: Adapter) -> None:
        if not self.offers(SupportsHeads):
            raise AdapterError(
                f"the adapter holds trained heads ({listed(adapter.heads, 5)}), and this backend "
                f"has no parameters other than the features'; heads=False leaves them out"
            )
        where = self.primitives.head_places(model)  # type: ignore[attr-defined]
        check_heads(adapter, where, type(model).__name__)
