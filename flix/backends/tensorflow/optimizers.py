"""Optimizers on rows of tables, as TensorFlow has them: on the rows in use alone (see :mod:`flix.backends.keras.rows`).

Before the step, a table's gradient (``tf.IndexedSlices``) is summed by row into a small dense matrix, so that clipping
and scaling see it as it is. At the table's turn, those rows of the table and of its slot variables (momentum, ...) are
gathered, the optimizer's own ``update_step`` runs on them, and they are scattered back.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from flix.backends.keras import rows as dense
from flix.backends.keras.parameters import is_table
from flix.core.errors import ConfigError


class Rows:
    """Some rows of a variable, as an optimizer sees a variable: a value, to be read and assigned to.

    Args:
        variable: the whole variable.
        rows: which of its rows; None for a matrix of its size, with zeros where it is not in use.
        use: without rows, bool ``[T, 1]``, the rows in use, or a scalar for all or none.
        unique_id: what the optimizer knows the variable by.
    """

    def __init__(self, variable: Any, rows: Any, use: Any, unique_id: Any = None) -> None:
        self.source, self.rows, self.use = variable, rows, use
        if rows is None:
            whole = tf.convert_to_tensor(variable)
            self.value = tf.where(use, whole, tf.zeros_like(whole))
        else:
            self.value = tf.gather(variable, rows)
        self.name = getattr(variable, "name", "")
        self.path = getattr(variable, "path", self.name)
        self._unique_id = unique_id

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def shape(self) -> Any:
        return self.value.shape

    def assign(self, value: Any) -> None:
        self.value = tf.cast(tf.convert_to_tensor(value), self.dtype)

    def assign_add(self, value: Any) -> None:
        self.assign(self.value + tf.cast(value, self.dtype))

    def assign_sub(self, value: Any) -> None:
        self.assign(self.value - tf.cast(value, self.dtype))

    def write(self) -> None:
        """Put the value back."""
        if self.rows is None:
            self.source.assign(tf.where(self.use, self.value, tf.convert_to_tensor(self.source)))
        else:
            self.source.scatter_update(tf.IndexedSlices(self.value, self.rows))

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> Any:
        return tf.convert_to_tensor(self.value, dtype=dtype, name=name)


def _delegate(name: str) -> Any:
    return lambda self, *others: getattr(self.value, name)(*others)


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "getitem",
):  # fmt: skip
    setattr(Rows, f"__{_name}__", _delegate(f"__{_name}__"))


class RowOptimizer(dense.RowOptimizer):
    """See :class:`flix.backends.keras.rows.RowOptimizer`; without ``whole``, on gathered rows."""

    METHODS = ("build", "apply", "update_step", "_use_weight_decay")
    COUNT = "int64"

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """The optimizer's apply, with the tables' gradients summed by row."""
        optimizer = self.optimizer
        if trainable_variables is not None and not optimizer.built:
            optimizer.build(list(trainable_variables))
        given = trainable_variables is not None
        held = trainable_variables if given else optimizer._trainable_variables
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if optimizer.gradient_accumulation_steps and replicas > 1:
            raise ConfigError(
                "gradient_accumulation_steps with several replicas is not supported for adapted models: "
                "replicas accumulate separately, so it is not known which features are absent "
                "from all of them"
            )
        ready = []
        for grad, variable in zip(grads, held, strict=True):
            if grad is not None and is_table(variable):
                index = optimizer._get_variable_index(variable)
                grad = self._by_row(grad, index, replicas)
            ready.append(grad)
        self.own.apply(optimizer, ready, trainable_variables)

    def _by_row(self, grad: Any, index: int, replicas: int) -> Any:
        """A table's gradient as the sum of each row in use, ``[K, d]``; notes which rows they are."""
        if not isinstance(grad, tf.IndexedSlices):
            # A loss on the whole table: every row is in use.
            grad = tf.IndexedSlices(grad, tf.range(tf.shape(grad)[0]))
        rows, values = grad.indices, grad.values
        if replicas > 1:
            # The rows of all replicas. The optimizer will sum over replicas what each has in full.
            context = tf.distribute.get_replica_context()
            rows = context.all_gather(rows, axis=0)
            values = context.all_gather(values, axis=0) / replicas
        if self.whole:
            size = self.optimizer._trainable_variables[index].shape[0]
            used = tf.math.unsorted_segment_max(tf.ones_like(rows), rows, size) > 0
            used = (used & (tf.range(size) > 0))[:, None]  # row 0 stands for unused slots
            if index in self.touched:
                used |= self.touched[index].value
                self.touched[index].assign(used)
            self.rows[index] = used
            values = tf.where(rows[:, None] > 0, values, tf.zeros([], values.dtype))
            return tf.math.unsorted_segment_sum(values, rows, size)
        rows, places = tf.unique(rows)
        summed = tf.math.unsorted_segment_sum(values, places, tf.size(rows))
        real = rows > 0
        self.rows[index] = tf.boolean_mask(rows, real)
        return tf.boolean_mask(summed, real)

    def _chosen(self, index: int) -> Any:
        """The rows in use, or None and which of the whole are."""
        return (None, super()._chosen(index)) if self.whole else (self.rows[index], None)

    def view(self, variable: Any, chosen: Any, unique_id: Any = None) -> Any:
        """The rows in use of a variable that has the table's rows."""
        rows, use = chosen
        if rows is None and len(variable.shape) == 1:
            use = use[:, 0]
        return Rows(_native(variable), rows, use, unique_id)

    def whole_view(self, variable: Any, chosen: Any) -> Any:
        """A variable of another shape, which is touched if any row is in use."""
        rows, use = chosen
        return Rows(
            _native(variable), None, tf.reduce_any(use) if rows is None else tf.size(rows) > 0
        )

    def _known(self, state: dict[str, Any]) -> None:
        """Keras knows variables by an id of TensorFlow's, which :class:`Rows` has."""


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable
