"""A backend under test: what the checks ask of it, by its own verbs and primitives, and by its harness for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import flix
from flix.backends.verbs import Verbs
from flix_conformance.harness import AdamW, Array, Batch, Case, Pairs, Stack
from flix_conformance.table import Feature


class Backend:
    """A backend with a name. Each method on a case makes a new model, unless the case has one.

    Attributes:
        name: how it is called in the report.
        module: its module, with ``primitives`` and the verbs that users call.
        primitives: the module's.
        harness: see :class:`flix_conformance.harness.Harness`.
        dtypes, strategies, kinds, excluded, id_dtypes, absent: the harness's.
    """

    def __init__(self, name: str, module: Any, harness: Any) -> None:
        self.name, self.module, self.harness = name, module, harness
        self.primitives = module.primitives
        self.dtypes, self.strategies, self.kinds = (
            tuple(getattr(harness, attribute)) for attribute in ("dtypes", "strategies", "kinds")
        )
        self.id_dtypes = tuple(getattr(harness, "id_dtypes", ("int32", "int64")))
        self.absent = tuple(getattr(harness, "absent", ()))
        self.excluded = tuple(getattr(harness, "excluded", ()))

    def verb(self, name: str) -> Any:
        """A public verb: the module's, or where it has none (a check says so) that of its primitives."""
        return getattr(self.module, name, None) or getattr(Verbs(self.primitives), name)

    def lacks(self, methods: Sequence[str]) -> list[str]:
        """Those of some optional methods and attributes that neither the harness nor the primitives have."""
        places = (self.harness, self.primitives)
        return [name for name in methods if not any(getattr(x, name, None) for x in places)]

    def within(self, dtype: str) -> AbstractContextManager[Any]:
        """Where a model of this dtype is made and used."""
        own = getattr(self.harness, "within", None)
        context: AbstractContextManager[Any] = nullcontext() if own is None else own(dtype)
        return context

    # Models.

    def plain(self, case: Case) -> Any:
        """A plain model of the case's layer."""
        return self.harness.plain([case.layer], case.x)

    def adapted(self, case: Case) -> Any:
        """An adapted model with the case's pairs, or the case's own model."""
        if case.model is not None:
            return case.model
        model = self.verb("adapt")(self.plain(case), case.config, strategy=case.strategy)
        return self.primitives.write(model, {case.path: case.pairs})

    def stacked(self, stack: Stack) -> Any:
        """An adapted model of several layers, with the stack's pairs."""
        plain = self.harness.plain(stack.layers, stack.batch.x)
        model = self.verb("adapt")(plain, stack.config, strategy=stack.strategy)
        return self.primitives.write(model, stack.pairs)

    def pairs(self, model: Any) -> Pairs:
        """The values of a model of one layer, copied."""
        ((_, pairs),) = self.primitives.read(model).items()
        return {feature: (np.array(a), np.array(b)) for feature, (a, b) in pairs.items()}

    def state(self, model: Any) -> tuple[dict[Feature, int], Pairs]:
        """The ids of the features that rows may name, and the pairs."""
        registry = self.primitives.adapted(model).registry
        return {feature: registry.id(*feature) for feature in registry.live}, self.pairs(model)

    # What a model computes.

    def forward(self, case: Case) -> tuple[Array, str]:
        """The output, and the name of its dtype."""
        with self.within(case.dtype):
            y, dtype = self.harness.call(self.adapted(case), case.batch)
        return y, str(dtype)

    def evaluated(self, case: Case) -> tuple[Array, str]:
        """As :meth:`forward`, in evaluation mode."""
        with self.within(case.dtype):
            y, dtype = self.harness.evaluated(self.adapted(case), case.batch)
        return y, str(dtype)

    def refuse(self, case: Case) -> Exception | None:
        """The error for malformed routing, or None if there was none."""
        run = getattr(self.harness, "refuse", self.harness.call)
        with self.within(case.dtype):
            model = self.adapted(case)
            try:
                run(model, case.batch)
            except Exception as error:
                return error
        return None

    def gradients(self, case: Case, dy: Array) -> Any:
        """See :class:`flix_conformance.harness.Harness`."""
        with self.within(case.dtype):
            return self.harness.gradients(self.adapted(case), case.batch, dy)

    def train(self, case: Case, batches: Sequence[Batch], settings: AdamW) -> dict[str, Any]:
        """Train: ``pairs``, a list of the values after each step, and ``base``, the last kernel."""
        model, trajectory = self.adapted(case), []
        step = self.harness.trainer(model, settings)
        for batch in batches:
            step(batch)
            trajectory.append(self.pairs(model))
        return {"pairs": trajectory, "base": self.harness.kernel(model, case.path)}

    # Verbs.

    def merge(self, case: Case, row: Any) -> Array:
        """The kernel ``[d_in, d_out]`` with one composition folded in."""
        with self.within(case.dtype), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # what else reads a kernel is the user's to know
            merged = self.verb("merge")(self.adapted(case), row)
            return np.asarray(self.harness.kernel(merged, case.path))

    def initial(self, case: Case) -> Pairs:
        """The pairs of a newly adapted layer."""
        with self.within(case.dtype):
            model = self.verb("adapt")(self.plain(case), case.config, strategy=case.strategy)
            return self.pairs(model)

    def save(self, case: Case, folder: Path) -> None:
        """Write the adapter of a model with the case's pairs."""
        with self.within(case.dtype):
            self.verb("save")(self.adapted(case), folder)

    def load(self, case: Case, folder: Path) -> Pairs:
        """Read an adapter into a plain model with the case's layer; the case's own pairs play no part."""
        with self.within(case.dtype):
            return self.pairs(self.verb("load")(self.plain(case), folder))

    def add_feature(
        self, model: Any, group: str, name: str, rank: int, init_from: Sequence[str]
    ) -> Any:
        """Add a feature, with fresh values or from some of its group; the others train no more."""
        return self.verb("add_feature")(model, group, name, rank, init_from=init_from)

    def remove_feature(self, model: Any, group: str, name: str) -> Any:
        """Remove a feature."""
        return self.verb("remove_feature")(model, group, name)

    def rename_feature(self, model: Any, group: str, name: str, new: str) -> Any:
        """Give a feature another name."""
        return self.verb("rename_feature")(model, group, name, new)

    def save_features(self, model: Any, folder: Path, features: Sequence[Feature]) -> None:
        """Write some of a model's features as an adapter's folder."""
        self.verb("save")(model, folder, features)

    def load_features(self, model: Any, folder: Path) -> Any:
        """Take all features of an adapter's folder into a model that has others."""
        return self.verb("load_features")(model, folder)

    # The core's, or the backend's own.

    def encode(
        self, config: flix.FlixConfig, rows: Sequence[Any], **options: Any
    ) -> tuple[Array, Array]:
        """(ids, weights) of a batch of rows."""
        own = getattr(self.harness, "encode", None)
        if own is not None:
            ids, weights = own(config, rows, **options)
            return np.asarray(ids), np.asarray(weights)
        routing = config.registry.encode(rows, **{"unknown": config.unknown, **options})
        return routing.ids, routing.weights

    def dropout(
        self, config: flix.FlixConfig, ids: Array, weights: Array, **place: int
    ) -> tuple[Array, Array]:
        """(ids, weights) of a batch after ``config.feature_dropout``, by ``seed``, ``step`` and ``first_row``."""
        own = getattr(self.harness, "dropout", None)
        if own is not None:
            ids, weights = own(config, ids, weights, **place)
            return np.asarray(ids), np.asarray(weights)
        assert config.feature_dropout is not None
        dropped = config.feature_dropout(flix.Routing(ids, weights, config.registry), **place)  # type: ignore[arg-type]
        return dropped.ids, dropped.weights
