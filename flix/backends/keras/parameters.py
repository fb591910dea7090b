"""The features' values in a layer: two tables, where each feature stands in them, and what a model knows of itself."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from flix.backends.keras import quantised
from flix.core.adapter.adapter import LayerShape, Pair
from flix.core.adapter.changes import fresh_pairs
from flix.core.adapter.initial import dropout_seed
from flix.core.config.config import FlixConfig
from flix.core.config.kernels import Form
from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError
from flix.core.features.names import Feature
from flix.core.features.registry import FeatureRegistry
from flix.core.strategy.decide import check_strategy

_DENSE = keras.backend.backend() != "tensorflow"
"""Whether gradients are as large as their variables, so that they do not say which rows they speak of."""
Live = NDArray[np.bool_] | None
"""Which rows of a table train, bool ``[1 + rows]``; None where all do."""


@dataclass(eq=False)
class FlixState:
    """What an adapted model carries, shared by the model and its layers. A layer used by hand has its own.

    Attributes:
        config: the configuration.
        frozen: ids of the features that do not train.
        version: how often features joined or left, froze or thawed; what was traced before is refused.
        flags: which layers trained before the base was frozen (``base.trainable_flags``).
        broken: features that a warning has named for values that are not finite.
        acted: layers that ran, and whether the model trained then.
        heads: names of the base's variables that were saved or loaded with the features.
        specs: the base's inputs as they were first given, as ``tf.TensorSpec``; None before.
    """

    config: FlixConfig
    frozen: tuple[int, ...] = ()
    version: int = 0
    flags: str = ""
    broken: set[Feature] = field(default_factory=set)
    acted: set[tuple[str, bool]] = field(default_factory=set)
    heads: tuple[str, ...] = ()
    specs: Any = None


def by_id(registry: FeatureRegistry, pairs: Mapping[Feature, Pair]) -> dict[int, Pair]:
    """Pairs by their features' ids."""
    return {registry.id(*feature): pair for feature, pair in pairs.items()}


def config_from(config: Any) -> FlixConfig:
    """A configuration, perhaps as Keras gives it back from a file.

    Raises:
        ConfigError: it is not one.
    """
    config = FlixConfig.from_dict(config) if isinstance(config, dict) else config
    if not isinstance(config, FlixConfig):
        raise ConfigError(f"an adapted layer needs config=FlixConfig, got {config!r}")
    return config


class Parameters:
    """The features' values in a layer; mixed into Keras layers.

    The pairs of all features stand in two variables: ``flix_A`` ``[1 + rows, d_in]`` and ``flix_B``
    ``[1 + rows, d_out]`` (B transposed), rows being the sum of the ranks, in the order of the ids. Row 0 is zero and
    stands for unused slots. One variable a feature would make a graph as large as the registry; a table is gathered
    from; on TensorFlow its gradients are ``tf.IndexedSlices``.

    Attributes:
        flix_kind: ``"linear"`` or ``"embedding"``.
        flix_base: the plain class.
        flix_state: what the model knows of itself; None until the layer is described.
        flix_name: the layer's path in its model.
        flix_strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        flix_layout: ranks and scales here.
        flix_live: which rows train.
        flix_A, flix_B: the tables; None where every rank is 0.
        flix_use: ``[1 + rows]``, a variable that stays 0, whose gradient counts the slots in which each row stood, for
            optimizers (:mod:`flix.backends.keras.rows`); None on TensorFlow, where the tables' own gradients tell.
        flix_seed: a linear layer's generator of masks for ``lora_dropout``; None where that is 0.
    """

    flix_kind = "linear"
    flix_base: Any
    flix_state: Any = None
    flix_name: str
    flix_strategy: str
    flix_layout: LayerLayout
    flix_live: Live
    flix_A: Any
    flix_B: Any
    flix_use: Any = None
    flix_seed: Any = None

    @staticmethod
    def form_of(layer: Any) -> Form:
        """How the kernel of a layer of this kind, adapted or not, is a matrix."""
        return Form((0,), (1,), quantised.kernel_shape(layer))

    @classmethod
    def shape_of(cls, layer: Any) -> LayerShape:
        """Kind and sizes of such a layer."""
        form = cls.form_of(layer)
        return LayerShape(form.d_in, form.d_out, cls.flix_kind)

    @property
    def layer_shape(self) -> LayerShape:
        """Kind and sizes."""
        return self.shape_of(self)

    @property
    def d_in(self) -> int:
        """Input size; of an embedding, the vocabulary's."""
        return self.layer_shape.d_in

    @property
    def d_out(self) -> int:
        """Output size."""
        return self.layer_shape.d_out

    @property
    def flix_config(self) -> FlixConfig:
        """The configuration."""
        return self.flix_state.config  # type: ignore[no-any-return]

    def describe(
        self, state: FlixState, name: str, strategy: str, layout: LayerLayout | None = None
    ) -> None:
        """Set what the layer is to be; its tables are made by :meth:`attach`, when it has its kernel."""
        check_strategy(strategy)
        self.flix_state, self.flix_name, self.flix_strategy = state, name, strategy
        self.set_layout(layout or state.config.layout(name))
        self.flix_A = self.flix_B = self.flix_use = None

    def set_layout(self, layout: LayerLayout) -> None:
        """Set ranks and scales, and what trains by the state's frozen features."""
        self.flix_layout, self.flix_live = layout, None
        if self.flix_state.frozen:
            trains = np.ones(len(layout.ranks), np.bool_)
            trains[list(self.flix_state.frozen)] = False
            self.flix_live = np.append(True, np.repeat(trains, layout.ranks))

    def attach(self, values: Mapping[int, Pair] | None = None) -> None:
        """Freeze the layer's own variables, and make the tables; default: of initial values."""
        for variable in [*self._trainable_variables, *self._non_trainable_variables]:  # type: ignore[attr-defined]
            variable.trainable = False
        if values is None:
            pairs = fresh_pairs(self.flix_config, self.flix_name, self.layer_shape)
            values = by_id(self.flix_config.registry, pairs)
        self.make_tables(values)
        if self.flix_config.lora_dropout and self.flix_kind == "linear" and self.flix_seed is None:
            seed = dropout_seed(self.flix_config.seed, self.flix_name)
            with self._unlocked():
                self.flix_seed = keras.random.SeedGenerator(seed)

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Variables may join a layer that is built."""
        tracker = self._tracker  # type: ignore[attr-defined]
        locked = tracker.locked
        tracker.unlock()
        yield
        if locked:
            tracker.lock()

    def make_tables(self, values: Mapping[int, Pair]) -> None:
        """Make the tables anew, from the pairs of every feature with an update here, by id."""
        for name in ("flix_A", "flix_B", "flix_use"):
            if getattr(self, name) is not None:
                self._untrack_variable(getattr(self, name))  # type: ignore[attr-defined]
                setattr(self, name, None)
        if not self.flix_layout.rows:
            return
        rows = 1 + self.flix_layout.rows
        # Pairs of a half-precision base are kept in float32, where small updates do not round away.
        dtype = "float64" if self.variable_dtype == "float64" else "float32"  # type: ignore[attr-defined]
        shape = self.layer_shape
        wholes = np.zeros((rows, shape.d_in), dtype), np.zeros((rows, shape.d_out), dtype)
        self.flix_layout.put(wholes[0][1:], wholes[1][1:], values)
        with self._unlocked(), self._open_name_scope():  # type: ignore[attr-defined]
            for name, whole in zip(("flix_A", "flix_B"), wholes, strict=True):
                table = self.add_weight(  # type: ignore[attr-defined]
                    name=name,
                    shape=whole.shape,
                    dtype=dtype,
                    initializer=lambda shape, dtype=None, whole=whole: ops.convert_to_tensor(whole),
                    trainable=True,
                    autocast=False,  # a cast would be of the whole table
                )
                table.flix_table = True
                self._lay_out(table, name == "flix_A")
                setattr(self, name, table)
            if _DENSE:
                self.flix_use = self.add_weight(  # type: ignore[attr-defined]
                    name="flix_use",
                    shape=(rows,),
                    dtype="float32",
                    initializer="zeros",
                    autocast=False,
                )
                self.flix_use.flix_table = self.flix_use.flix_counts = True
                self.flix_A.flix_mark = self.flix_B.flix_mark = self.flix_use

    def _lay_out(self, table: Any, inputs: bool) -> None:
        """Spread a table's columns over devices as the kernel's inputs or outputs are (``keras.distribution``).

        What a ``LayoutMap`` says of the table itself goes first.
        """
        layout, own = getattr(kernel_of(self), "_layout", None), getattr(table, "_layout", None)
        if not isinstance(layout, keras.distribution.TensorLayout) or any(getattr(own, "axes", ())):
            return
        form = self.form_of(self)
        axes = (form.contracted if inputs else form.free)[:1]
        if axes and len(layout.axes) == len(form.shape):
            spread = [None, layout.axes[axes[0]]]
            table._layout = keras.distribution.TensorLayout(spread, layout.device_mesh)
            table.assign(table.value)

    def span(self, feature: int) -> slice:
        """The rows of the tables that are a feature's."""
        rows = self.flix_layout.span(feature)
        return slice(1 + rows.start, 1 + rows.stop)

    def values(self, ids: Collection[int] | None = None) -> dict[int, Pair]:
        """A ``[r, d_in]`` and B ``[d_out, r]`` by id, of some features or all; each table is read once."""
        if self.flix_A is None:
            return {}
        layout, tables = self.flix_layout, (self.flix_A, self.flix_B)
        if ids is None:
            a, b = (values_of(table)[1:] for table in tables)
            return layout.pairs(a, b)
        rows = np.concatenate([np.r_[self.span(i)] for i in ids] or [[]]).astype(np.int32)
        a, b = (ops.convert_to_numpy(ops.take(table.value, rows, axis=0)) for table in tables)
        chosen = [i for i in ids if layout.ranks[i]]
        ends = itertools.accumulate(layout.ranks[i] for i in chosen)
        return {
            i: (a[end - layout.ranks[i] : end], b[end - layout.ranks[i] : end].T)
            for i, end in zip(chosen, ends, strict=True)
        }

    def set_values(self, values: Mapping[int, Pair]) -> None:
        """Set pairs by id; the others stay as they are."""
        if self.flix_A is not None:
            a, b = values_of(self.flix_A).copy(), values_of(self.flix_B).copy()
            self.flix_layout.put(a[1:], b[1:], values)
            self.flix_A.assign(a)
            self.flix_B.assign(b)

    def pairs(self) -> Iterator[tuple[Feature, NDArray[Any], NDArray[Any]]]:
        """(feature, A ``[r, d_in]``, B ``[d_out, r]``) of every feature with an update here."""
        for i, (a, b) in self.values().items():
            yield self.flix_config.registry.features[i], a, b

    def save_own_variables(self, store: Any) -> None:
        """Keras's hook: the base's variables, then the tables."""
        super().save_own_variables(store)  # type: ignore[misc]
        if self.flix_A is not None:
            store["flix_A"], store["flix_B"] = self.flix_A, self.flix_B

    def load_own_variables(self, store: Any) -> None:
        """Keras's hook; see :meth:`save_own_variables`."""
        known = store
        if self.flix_use is not None:  # Keras counts a layer's variables; this one is in no file
            known = {**{name: store[name] for name in store.keys()}, "flix_use": None}  # noqa: SIM118
        super().load_own_variables(known)  # type: ignore[misc]
        if self.flix_A is not None:
            self.flix_A.assign(store["flix_A"])
            self.flix_B.assign(store["flix_B"])

    def get_config(self) -> dict[str, Any]:
        """Keras's hook: the base's configuration and flix's."""
        return {
            **super().get_config(),  # type: ignore[misc]
            "config": self.flix_config.to_dict(),
            "path": self.flix_name,
            "strategy": self.flix_strategy,
            "frozen": list(self.flix_state.frozen),
        }

    def build(self, input_shape: Any = None) -> None:
        """Keras's hook, for layers made by hand."""
        super().build(input_shape)  # type: ignore[misc]
        if self.flix_state is not None and self.flix_A is None:
            self.attach()


def values_of(variable: Any) -> NDArray[Any]:
    """A variable's values."""
    return np.asarray(variable.numpy())


def kernel_of(layer: Any) -> Any:
    """The variable that holds the kernel of a layer, adapted or not."""
    return layer._embeddings if isinstance(layer, keras.layers.Embedding) else layer._kernel


def is_table(variable: keras.Variable) -> bool:
    """Whether a Keras variable is a table of pairs, of which only the rows in use are trained, or ``flix_use``."""
    return bool(getattr(variable, "flix_table", False))


def is_mark(variable: keras.Variable) -> bool:
    """Whether a Keras variable is a layer's ``flix_use``."""
    return bool(getattr(variable, "flix_counts", False))
