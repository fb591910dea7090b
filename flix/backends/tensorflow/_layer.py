"""What all adapted layers share: the features' tables, and how routing reaches a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flix.backends.tensorflow._context import ActiveRouting, current, make_routing, tables_of
from flix.backends.tensorflow._ops import Live
from flix.core.adapter.initial import initial_a
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError, RoutingError
from flix.core.features.registry import Feature
from flix.core.strategy.decide import Facts, check_strategy, decide

_MANY = 1 << 20
"""Stands for a size that is not known while a graph is traced."""


class FlixLayer:
    """What all adapted layers share; mixed into Keras layers.

    The pairs of all features stand in two variables: ``flix_A`` ``[1 + rows, d_in]`` and ``flix_B``
    ``[1 + rows, d_out]`` (B transposed), rows being the sum of the ranks, in the order of the ids. Row 0 is zero and
    stands for unused slots. One variable a feature would make a graph as large as the registry; a table is gathered
    from, and its gradients are ``tf.IndexedSlices``.

    Attributes:
        flix_name: the layer's path in its model.
        flix_config: the configuration.
        flix_layout: ranks and scales here.
        flix_strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        flix_frozen: ids of features that do not train.
        flix_enabled: False while the model is disabled.
        flix_A, flix_B: the tables; None where every rank is 0.
    """

    flix_kind = "linear"
    flix_base: type[keras.layers.Layer]
    flix_name: str
    flix_config: FlixConfig
    flix_layout: LayerLayout
    flix_strategy: str
    flix_frozen: tuple[int, ...]
    flix_live: Live
    flix_enabled = True
    flix_A: Any
    flix_B: Any

    @staticmethod
    def sizes_of(layer: Any) -> tuple[int, int]:
        """(d_in, d_out) of a layer of this kind, adapted or not."""
        raise TypeError("an adapted layer's class gives its sizes")

    @property
    def d_in(self) -> int:
        """Input size; of an embedding, the vocabulary's."""
        return self.sizes_of(self)[0]

    @property
    def d_out(self) -> int:
        """Output size."""
        return self.sizes_of(self)[1]

    def describe(
        self,
        config: FlixConfig,
        name: str,
        strategy: str,
        frozen: tuple[int, ...] = (),
        layout: LayerLayout | None = None,
    ) -> None:
        """Set what the layer is to be; its tables are made by :meth:`attach`, when it has its kernel."""
        if not isinstance(config, FlixConfig):
            raise ConfigError(f"an adapted layer needs config=FlixConfig, got {config!r}")
        check_strategy(strategy)
        self.flix_name = name
        self.flix_strategy = strategy
        self.set_config(config, layout, frozen)
        self.flix_A = self.flix_B = None

    def set_config(
        self,
        config: FlixConfig,
        layout: LayerLayout | None = None,
        frozen: tuple[int, ...] = (),
    ) -> None:
        """Set the configuration, what follows from it, and the features that do not train."""
        self.flix_config = config
        self.flix_layout = layout or config.layout(self.flix_name)
        self.flix_frozen = tuple(frozen)
        self.flix_live = None
        if self.flix_frozen:
            tables = tables_of(self.flix_layout)
            live = np.ones(tables.rows, np.bool_)
            for feature in self.flix_frozen:
                live[self._span(feature)] = False
            self.flix_live = live

    def attach(self) -> None:
        """Make the tables, with initial values, and freeze the base's variables."""
        for variable in self.base_variables():
            variable.trainable = False
        self.make_tables({f: self.fresh_a(f) for f in self.flix_config.registry.live})

    def base_variables(self) -> list[Any]:
        """The frozen variables of the layer itself."""
        own = [*self._trainable_variables, *self._non_trainable_variables]  # type: ignore[attr-defined]
        return [v for v in own if not is_table(v)]

    def fresh_a(self, feature: Feature) -> NDArray[np.float32]:
        return initial_a(
            seed=self.flix_config.seed,
            layer=self.flix_name,
            group=feature[0],
            feature=feature[1],
            rank=self.flix_config.rank(self.flix_name, feature),
            d_in=self.d_in,
        )

    def make_tables(self, a: dict[Feature, Any], b: dict[Feature, Any] | None = None) -> None:
        """Make the tables from A ``[r, d_in]`` and B ``[d_out, r]`` (default 0) of every feature with an update."""
        rows = tables_of(self.flix_layout).rows
        for name in ("flix_A", "flix_B"):
            if getattr(self, name) is not None:
                self._untrack_variable(getattr(self, name))  # type: ignore[attr-defined]
                setattr(self, name, None)
        if rows == 1:
            return
        # Pairs of a half-precision base are kept in float32, where small updates do not round away.
        dtype = "float64" if self.variable_dtype == "float64" else "float32"  # type: ignore[attr-defined]
        wholes = (np.zeros((rows, self.d_in), dtype), np.zeros((rows, self.d_out), dtype))
        for i, feature in enumerate(self.flix_config.registry.features):
            if not self.flix_layout.ranks[i]:
                continue
            wholes[0][self._span(i)] = a[feature]
            if b is not None:
                wholes[1][self._span(i)] = np.transpose(b[feature])
        tracker = self._tracker  # type: ignore[attr-defined]
        locked = tracker.locked
        tracker.unlock()
        with self._open_name_scope():  # type: ignore[attr-defined]
            for name, whole in zip(("flix_A", "flix_B"), wholes, strict=True):
                table = self.add_weight(  # type: ignore[attr-defined]
                    name=name,
                    shape=whole.shape,
                    dtype=dtype,
                    initializer=lambda shape, dtype=None, whole=whole: tf.convert_to_tensor(whole),
                    trainable=True,
                    autocast=False,  # a cast would be of the whole table
                )
                table.flix_table = True
                setattr(self, name, table)
        if locked:
            tracker.lock()

    def _span(self, feature: int) -> slice:
        tables = tables_of(self.flix_layout)
        start = int(tables.starts[feature])
        return slice(start, start + int(tables.ranks[feature]))

    def pairs(self) -> Iterator[tuple[Feature, NDArray[Any], NDArray[Any]]]:
        """(feature, A ``[r, d_in]``, B ``[d_out, r]``) of every feature with an update here; copies."""
        if self.flix_A is None:
            return
        a, b = self.flix_A.numpy(), self.flix_B.numpy()
        for i, feature in enumerate(self.flix_config.registry.features):
            if self.flix_layout.ranks[i]:
                span = self._span(i)
                yield feature, a[span].copy(), b[span].T.copy()

    def set_pairs(self, a: dict[Feature, Any], b: dict[Feature, Any]) -> None:
        """Set A ``[r, d_in]`` and B ``[d_out, r]`` of the features given."""
        if self.flix_A is None:
            return
        wholes = self.flix_A.numpy().copy(), self.flix_B.numpy().copy()
        for i, feature in enumerate(self.flix_config.registry.features):
            if feature in a and self.flix_layout.ranks[i]:
                wholes[0][self._span(i)] = a[feature]
                wholes[1][self._span(i)] = np.transpose(b[feature])
        self.flix_A.assign(wholes[0])
        self.flix_B.assign(wholes[1])

    def _routing(self, features: Any, weights: Any, training: Any) -> ActiveRouting | None:
        """The routing to run under: the one given, or the one in force; None to run the base alone."""
        if not self.flix_enabled:
            return None
        if features is not None:
            routing = make_routing(self.flix_config.registry, features, weights)
            return routing if self.flix_A is not None else None
        if weights is not None:
            raise RoutingError(
                "flix_weights was given without flix_features; weights belong to ids"
            )
        if current.routing is None and training:
            raise RoutingError(
                f"layer {self.flix_name!r} is adapted and in training, but no routing is in force; call "
                'the adapted model with {"inputs": x, "flix_features": ids} (rows of base output: ids of '
                "-1)"
            )
        return current.routing if self.flix_A is not None else None

    def _strategy_for(self, routing: ActiveRouting, given: list[int | None]) -> str:
        """The strategy for an input of these leading sizes, from shapes alone."""
        examples, total = _product(routing.lead), _product(given)
        if len(given) > len(routing.lead):
            tokens = _product(given[len(routing.lead) :])
        elif _MANY in (examples, total) or not examples:
            tokens = 1
        else:  # more than 1 where the model flattened its input
            tokens = total // examples
        ranks = sorted(self.flix_layout.ranks, reverse=True)
        rows = sum(ranks[: int(routing.ids.shape[-1] or len(ranks))])
        facts = Facts(
            examples=examples,
            positions=tokens,
            rows=rows,
            union=min(sum(ranks), examples * rows),  # ids are not known in a graph
            device="tensorflow-cpu",
        )
        strategy = decide(self.flix_strategy, facts).strategy
        if strategy == "single" and routing.unlike is not None:
            raise ConfigError(
                f"strategy 'single' needs one composition for all rows, but row {routing.unlike} "
                "differs from row 0; use 'auto', 'gather' or 'masked'"
            )
        return strategy

    def _grouped(self, x: Any, routing: ActiveRouting, trailing: int) -> tuple[Any, Any, Any]:
        """x with its leading dimensions fitted to the routing's rows.

        Args:
            x: ``[..., d_in]`` (trailing 1), or token ids ``[...]`` (trailing 0).
            routing: the routing in force.
            trailing: the number of dimensions of x that are no positions.

        Returns:
            x (repeated where it has one row for all), the rows N and the positions S a row.

        Raises:
            RoutingError: the leading dimensions are not the routing's.
        """
        lead = routing.lead
        given = x.shape.as_list()[: x.shape.rank - trailing]
        if (
            len(given) >= len(lead)
            and given[0] == 1 != lead[0]
            and _compatible(given[1 : len(lead)], lead[1:])
        ):
            # One row for all, as position ids have it: each row of the batch gets its own.
            x = tf.repeat(x, tf.shape(routing.ids)[0], axis=0)
            given = x.shape.as_list()[: x.shape.rank - trailing]
        dynamic, rows = tf.shape(x), tf.shape(routing.ids)[:-1]
        count = tf.reduce_prod(rows)
        total = tf.reduce_prod(dynamic[: len(given)])
        fits = len(given) >= len(lead) and _compatible(given[: len(lead)], lead)
        # Models that flatten [B, S, d] to [B * S, d] before a layer.
        lengths = (1,) if routing.per_token else routing.lengths
        known = _product(lead)
        flattened = len(given) == 1 and any(
            None in (given[0], _static(length)) or known >= _MANY or given[0] == known * length
            for length in lengths
        )
        if not fits and not flattened:
            raise self._misfit(given, lead, routing)
        if None in given or None in lead or (flattened and not fits):
            same = tf.constant(False)
            if fits:
                same = tf.reduce_all(dynamic[: len(lead)] == rows)
            for length in lengths if flattened else ():
                same = same | (total == count * length)
            check = tf.debugging.Assert(same, [str(self._misfit(given, lead, routing))])
            if check is not None:  # in a graph; None in eager mode
                with tf.control_dependencies([check]):
                    x = tf.identity(x)
        return x, count, total // tf.maximum(count, 1)

    def _misfit(
        self, given: list[int | None], lead: list[int | None], routing: ActiveRouting
    ) -> RoutingError:
        what = "[batch, length]" if routing.per_token else "[batch]"
        return RoutingError(
            f"layer {self.flix_name!r} got an input of leading shape {given}, but flix_features routes "
            f"{what} = {lead}; one row of ids is needed for each row of the batch (and one for each "
            "position, where routing is per token)"
        )

    def save_own_variables(self, store: Any) -> None:
        """Keras's hook: the base's variables, then the tables."""
        super().save_own_variables(store)  # type: ignore[misc]
        if self.flix_A is not None:
            store["flix_A"], store["flix_B"] = self.flix_A, self.flix_B

    def load_own_variables(self, store: Any) -> None:
        """Keras's hook; see :meth:`save_own_variables`."""
        super().load_own_variables(store)  # type: ignore[misc]
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
            "frozen": list(self.flix_frozen),
        }

    def build(self, input_shape: Any = None) -> None:
        """Keras's hook, for layers made by hand."""
        super().build(input_shape)  # type: ignore[misc]
        if self.flix_A is None:
            self.attach()


def is_table(variable: Any) -> bool:
    """Whether a Keras variable is a table of low-rank rows, of which only the rows in use are trained."""
    return bool(getattr(variable, "flix_table", False))


def config_from(config: Any) -> Any:
    """A configuration as Keras gives it back from a file."""
    return FlixConfig.from_dict(config) if isinstance(config, dict) else config


def _static(length: Any) -> int | None:
    return length if isinstance(length, int) else None


def _product(sizes: list[int | None]) -> int:
    total = 1
    for size in sizes:
        if size is None:
            return _MANY
        total *= size
    return min(total, _MANY)


def _compatible(a: list[int | None], b: list[int | None]) -> bool:
    return all(None in (x, y) or x == y for x, y in zip(a, b, strict=True))
