"""Optimizers that leave features absent from a batch bit-identical.

A layer's features share one table, and a Keras optimizer treats a variable as one: momentum, weight decay and moving
averages would move every row at every step, at a cost that grows with the registered features. :func:`keep_absent`
makes an optimizer apply itself to the rows in use alone. Before the step, the table's gradient (``tf.IndexedSlices``)
is summed by row into a small dense matrix, so that clipping and scaling see it as it is. At the table's turn, those
rows of the table and of its slot variables (momentum, ...) are gathered, the optimizer's own ``update_step`` runs on
them, and they are scattered back. Nothing else is touched, whatever the optimizer.

A feature is in use where a row of the batch lists it with another weight than 0. Each row counts the steps that it
took part in, and Adam's bias correction goes by that count, as it does in PyTorch for a parameter of its own: a rare
feature's first step is a first step. Optimizers that keep other state for a whole variable (Adafactor, Nadam) go by
the common count, and those that look at a variable as a matrix (Lamb, Adafactor) see the rows in use as one.
"""

from __future__ import annotations

from typing import Any, TypeVar

import keras
import tensorflow as tf

from flix.backends.tensorflow.parameters import is_table
from flix.backends.tensorflow.patches import optimizers as patches
from flix.core.errors import ConfigError

Optimizer = TypeVar("Optimizer", bound=keras.optimizers.Optimizer)

_NO_SLOTS = ("_variables", "_trainable_variables", "_accumulated_gradients")


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


class RowOptimizer:
    """What :func:`keep_absent` puts on one optimizer: the methods that stand in for the optimizer's own."""

    def __init__(self, optimizer: Any, whole: bool) -> None:
        if optimizer.use_ema:
            raise ConfigError(
                "an optimizer with use_ema=True overwrites the parameters of every feature, also of those "
                "absent from a batch; use it without"
            )
        self.optimizer = optimizer
        self.own = type(optimizer)
        # Accumulated gradients have the table's shape.
        self.whole = whole or bool(optimizer.gradient_accumulation_steps)
        self.rows: dict[int, Any] = {}  # the rows in use; under `whole`, bool [T, 1]
        self.steps: dict[int, Any] = {}
        self.touched: dict[int, Any] = {}
        if optimizer.built:
            self._add_counts()

    def build(self, variables: Any) -> None:
        """The optimizer's build, and a count of steps for every row of every table."""
        already = self.optimizer.built
        self.own.build(self.optimizer, variables)
        if not already:
            self._add_counts()

    def _add_counts(self) -> None:
        add = self.optimizer.add_variable
        for index, table in enumerate(self.optimizer._trainable_variables):
            if is_table(table):
                rows = (table.shape[0], 1)
                self.steps[index] = add(rows, dtype="int64", name="flix_steps")
                if self.optimizer.gradient_accumulation_steps:
                    self.touched[index] = add(rows, dtype="bool", name="flix_touched")

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
                "replicas accumulate apart, and features absent from all of them cannot be told"
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

    def _use_weight_decay(self, variable: Any) -> bool:
        """Tables decay in :meth:`update_step`, by row."""
        index = self.optimizer._get_variable_index(variable)
        if is_table(self.optimizer._trainable_variables[index]):
            return False
        return bool(self.own._use_weight_decay(self.optimizer, variable))

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The optimizer's update_step; of a table, on the rows in use."""
        optimizer = self.optimizer
        index = optimizer._get_variable_index(variable)
        if not is_table(optimizer._trainable_variables[index]):
            self.own.update_step(optimizer, gradient, variable, learning_rate)
            return
        rows, use = self.rows[index], None
        if self.whole:
            rows, use = None, self.rows[index]
            if index in self.touched:
                use = tf.convert_to_tensor(self.touched[index].value)
                self.touched[index].assign(tf.zeros_like(use))
        steps = Rows(self.steps[index].value, rows, use)
        table = Rows(variable, rows, use, optimizer._var_key(variable))
        decay = getattr(optimizer, "adam_weight_decay", optimizer.weight_decay)
        if decay is not None and self.own._use_weight_decay(optimizer, variable):
            rate = tf.cast(decay, table.dtype) * tf.cast(optimizer.learning_rate, table.dtype)
            table.assign_sub(table.value * rate)
        shadow, slots = self._on_rows(index, steps)
        self.own.update_step(shadow, gradient, table, learning_rate)
        steps.assign_add(1)
        for held in (table, steps, *slots):
            held.write()

    def _on_rows(self, index: int, steps: Rows) -> tuple[Any, list[Rows]]:
        """A stand-in for the optimizer whose slots of one variable are some of their rows."""
        optimizer = self.optimizer
        rows, use = steps.rows, steps.use
        any_use = tf.reduce_any(use) if rows is None else tf.size(rows) > 0
        shape = tuple(optimizer._trainable_variables[index].shape)
        shadow = object.__new__(self.own)
        state = shadow.__dict__
        state.update(optimizer.__dict__)
        slots: list[Rows] = []
        elementwise = True
        for name, value in optimizer.__dict__.items():
            if isinstance(value, keras.Variable):
                elementwise &= name in ("_iterations", "_learning_rate")
            if (
                name in _NO_SLOTS
                or not isinstance(value, list)
                or len(value) != len(optimizer._trainable_variables)
                or not isinstance(value[index], keras.Variable)
            ):
                continue
            slot = value[index]
            # A factored slot has a number a row, or one a column; optimizers make the rows' first.
            by_row = tuple(slot.shape) == shape or (elementwise and tuple(slot.shape) == shape[:1])
            elementwise &= tuple(slot.shape) == shape
            if not by_row:
                held = Rows(slot.value, None, any_use)
            elif rows is None and len(slot.shape) == 1:
                held = Rows(slot.value, None, use[:, 0])
            else:
                held = Rows(slot.value, rows, use)
            slots.append(held)
            state[name] = [*value[:index], held, *value[index + 1 :]]
        if self.own.__name__ == "Muon" and optimizer.adam_velocities[index] is None:
            raise ConfigError(
                "Muon orthogonalises whole matrices, which the features' tables are not; give it "
                "exclude_layers=['flix_'], so that it trains them as AdamW does"
            )
        state["gradient_accumulation_steps"] = None
        state["_iterations"] = steps.value if elementwise else optimizer.iterations
        for name in patches.METHODS:
            state.pop(name, None)
        return shadow, slots


def keep_absent(optimizer: Optimizer, whole: bool = False) -> Optimizer:
    """Make a Keras optimizer, in place, leave the features absent from a batch as they are, bit by bit.

    ``compile`` of an adapted model does this, and an optimizer that is built for features' tables does it by itself:
    in loops written by hand, and in models around an adapted one or with flix layers of their own. By hand::

        optimizer = keep_absent(keras.optimizers.AdamW(1e-3))

    Args:
        optimizer: any Keras optimizer; of one that wraps others (loss scaling, several optimizers), those inside.
        whole: compute on whole tables and keep the rows in use, instead of on these rows alone: what XLA, whose
            sizes are fixed, compiles well. Gradient accumulation always does.

    Returns:
        The same optimizer.

    Raises:
        ConfigError: no Keras optimizer, or one with ``use_ema=True``.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"keep_absent needs a Keras optimizer, got {optimizer!r}")
    if hasattr(optimizer, "inner_optimizer"):
        keep_absent(optimizer.inner_optimizer, whole)
    elif type(optimizer).__name__ == "MultiOptimizer":
        patches.reach_inside(optimizer, lambda inner: keep_absent(inner, whole))
    elif isinstance(held := getattr(optimizer, "flix_rows", None), RowOptimizer):
        held.whole |= whole
    else:
        patches.put_on(optimizer, RowOptimizer(optimizer, whole))
    return optimizer


def _keep_if_tables(optimizer: Any, variables: Any) -> None:
    if any(is_table(variable) for variable in variables):
        keep_absent(optimizer)


patches.install(_keep_if_tables)
