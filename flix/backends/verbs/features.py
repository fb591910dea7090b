"""Features over a model's life: they join, leave, get other names, and come from other people's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flix import hub
from flix.backends.verbs.files import Files
from flix.core.adapter.adapter import Adapter, Rename
from flix.core.adapter.changes import growing, joining, removing, renaming
from flix.core.adapter.files import load_adapter
from flix.core.features.names import Feature
from flix.core.files import Path_
from flix.core.peft.importing import from_peft

M = TypeVar("M")


class Features(Files):
    """Verbs about single features."""

    def add_feature(
        self,
        model: M,
        group: str,
        name: str,
        rank: int | None = None,
        *,
        init_from: str | Sequence[str] | None = None,
        freeze_others: bool = True,
        alpha: float | None = None,
        implies: Sequence[Feature] = (),
    ) -> M:
        """Add one feature to an adapted model; ids and values of the others stay bit for bit.

        In torch, an optimizer that you made before continues for the others; give it the parameter of the new
        feature. In JAX and Keras, the features of a layer share tables, which grow, so make a new optimizer and
        compile again.

        Args:
            model: an adapted model.
            group: a group of its registry.
            name: the new feature.
            rank: its rank in every layer; default: that of ``init_from``.
            init_from: None for fresh values (the update starts at zero), or features of the group whose update (for
                several: the mean of whose updates) the new one starts from, as near as its rank allows.
            freeze_others: let only the new feature train.
            alpha: its alpha; default: the configuration's rule.
            implies: features that it implies.

        Returns:
            The model.

        Raises:
            FeatureError: an unknown group or source, or a name that exists already.
            RankError: no rank, and nothing from which to take it.
            TargetError: the model is not adapted.
        """
        config = self.config_of("add_feature", model)
        growth = growing(
            config, group, name, rank, init_from=init_from, alpha=alpha, implies=implies
        )
        origins = self.primitives.read(model, growth.origins) if growth.origins else {}
        change = growth.change(self.primitives.shapes(model), origins)
        model = self.primitives.change(model, change)
        return self.primitives.set_frozen(model, tuple(change.kept)) if freeze_others else model

    def remove_feature(self, model: M, group: str, name: str) -> M:
        """Remove one feature from an adapted model; ids and values of the others stay bit for bit.

        Its id stays reserved. Routing that names it is an error (or gives NaN in its rows, if only a compiled program
        knows the ids), and ``add_feature`` with the same name uses the id again. For optimizers, see ``add_feature``.

        Returns:
            The model.

        Raises:
            FeatureError: no such feature, or the last of its group.
            TargetError: the model is not adapted.
        """
        config = self.config_of("remove_feature", model)
        return self.primitives.change(model, removing(config, group, name))

    def rename_feature(self, model: M, group: str, name: str, new: str) -> M:
        """Give one feature of an adapted model another name; its id, values and training state stay.

        Returns:
            The model.

        Raises:
            FeatureError: no such feature, or a new name that is ill-formed or taken.
            TargetError: the model is not adapted.
        """
        config = self.config_of("rename_feature", model)
        return self.primitives.change(model, renaming(config, group, name, new))

    def load_features(
        self,
        model: M,
        source: Path_ | Adapter,
        features: Any = None,
        *,
        conflicts: str = "error",
        rename: Rename = None,
        freeze_others: bool = False,
    ) -> M:
        """Add features of another adapter to an adapted model; present ids and values stay bit for bit.

        Layers that only the other adapter adapts become adapted in this model. For optimizers, see ``add_feature``.

        Args:
            model: an adapted model.
            source: an adapter's folder, its name on a hub, or an adapter.
            features: ``[(group, name), ...]`` or ``{group: name or names}``; features that they imply are included.
                Default: all.
            conflicts: what to do if both have a feature and it differs: ``"error"``; ``"keep"`` the model's;
                ``"replace"`` them.
            rename: translates the adapter's layer paths to the model's.
            freeze_others: let only the added features train.

        Returns:
            The model.

        Raises:
            FeatureError: an unknown feature.
            AdapterError: a damaged file, features that differ, or an adapter for another architecture.
            TargetError: the model is not adapted.
        """
        self.config_of("load_features", model)
        given = isinstance(source, Adapter)
        adapter = source.renamed(rename) if given else load_adapter(hub.place(source), rename)  # type: ignore[union-attr, arg-type]
        self.check_fits(adapter, model)
        change = joining(self.adapter_of(model), adapter, features, conflicts=conflicts)
        model = self.primitives.change(model, change)
        return self.primitives.set_frozen(model, tuple(change.kept)) if freeze_others else model

    def import_peft(
        self,
        model: M,
        folders: Mapping[str, Path_],
        group: str,
        *,
        conflicts: str = "error",
        rename: Rename = None,
        skip_modules: bool = False,
        strategy: str = "auto",
    ) -> M:
        """Turn LoRAs that PEFT wrote into features of one group.

        A plain model is adapted in exactly the LoRAs' layers; an adapted model gets them as ``load_features`` does
        it. PEFT names layers as torch does, so models of other frameworks mostly need ``rename``.

        Args:
            model: a plain or adapted model with the weights that the LoRAs were trained on.
            folders: the folder of each LoRA, by the name that its feature gets: ``{"ner": "loras/ner"}``.
            group: their group; it may already exist.
            conflicts: as for ``load_features``.
            rename: translates the LoRAs' layer paths to the model's.
            skip_modules: leave out whole modules that were trained with a LoRA, instead of refusing them.
            strategy: as for ``adapt``, for a plain model.

        Returns:
            The adapted model.

        Raises:
            AdapterError: a folder without a plain LoRA, or a LoRA for another architecture.
            FeatureError: an ill-formed name.
        """
        adapter = from_peft(folders, group, skip_modules=skip_modules).renamed(rename)
        if self.primitives.adapted(model) is None:
            return self.load_into(model, adapter, strategy=strategy)
        return self.load_features(model, adapter, conflicts=conflicts)
