"""Optimizers on the rows of tables that are in use: what ``keep_absent`` puts on one.

A layer's features share one table, and a Keras optimizer treats a variable as one: momentum, weight decay and moving
averages would move every row at every step. Here the optimizer's own ``update_step`` runs on the rows in use alone, on
them in the table and in its slot variables (momentum, ...). Nothing else is touched, whatever the optimizer.

A feature is in use where a row of the batch lists it with another weight than 0. Each row counts the steps that it
took part in, and Adam's bias correction goes by that count, as it does in PyTorch for a parameter of its own: a rare
feature's first step is a first step. Optimizers that keep other state for a whole variable (Adafactor, Nadam) go by
the common count, and those that look at a variable as a matrix (Lamb, Adafactor) see the rows in use as one.

Gradients of JAX and torch are as large as the table and do not say which rows they speak of: a feature that acted may
have a gradient of zero. A layer's ``flix_use`` says it, a variable that is never changed, whose gradient counts in how
many slots each row stood. TensorFlow's gradients say it themselves (:mod:`flix.backends.tensorflow.optimizers`).
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from flix.backends.keras.parameters import is_mark, is_table
from flix.core.errors import ConfigError

_NO_SLOTS = ("_variables", "_trainable_variables", "_accumulated_gradients")


class Rows(keras.Variable):  # type: ignore[misc]
    """A variable with zeros where it is not in use, as an optimizer sees it: a value, to be read and assigned to.

    Args:
        variable: the whole variable.
        use: bool ``[T, 1]``, or ``[T]`` for a variable of one dimension, or a scalar for all or none.
        unique_id: what the optimizer knows the variable by.
    """

    def __init__(self, variable: Any, use: Any, unique_id: Any = None) -> None:
        whole = ops.stop_gradient(ops.convert_to_tensor(variable))
        self.source, self.use, self.flix_id = variable, use, unique_id
        self.held = ops.where(use, whole, ops.zeros_like(whole))
        self._name, self._path = variable.name, variable.path
        self._trainable = self._autocast = False

    @property
    def value(self) -> Any:
        return self.held

    @property
    def dtype(self) -> Any:
        return keras.backend.standardize_dtype(self.held.dtype)

    @property
    def shape(self) -> Any:
        return tuple(self.held.shape)

    def assign(self, value: Any) -> None:
        self.held = ops.cast(ops.convert_to_tensor(value), self.dtype)

    def assign_add(self, value: Any) -> None:
        self.assign(ops.add(self.held, ops.cast(value, self.dtype)))

    def assign_sub(self, value: Any) -> None:
        self.assign(ops.subtract(self.held, ops.cast(value, self.dtype)))

    def write(self) -> None:
        """Put the value back."""
        self.source.assign(ops.where(self.use, self.held, ops.convert_to_tensor(self.source)))


class RowOptimizer:
    """The methods that stand in for an optimizer's own.

    Args:
        optimizer: a Keras optimizer.
        whole: compute on whole tables and keep the rows in use; always so but on TensorFlow.

    Attributes:
        METHODS: their names.
        COUNT: the dtype of the counts of steps.
    """

    METHODS: tuple[str, ...] = (
        "build", "apply", "update_step", "_use_weight_decay", "_apply_weight_decay", "_backend_update_step",
    )  # fmt: skip
    COUNT = "int32"

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
        self.rows: dict[int, Any] = {}  # what is in use of a table, by its index
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
            if is_table(table) and not is_mark(table):
                rows = (table.shape[0], 1)
                self.steps[index] = add(rows, dtype=self.COUNT, name="flix_steps")
                if self.optimizer.gradient_accumulation_steps:
                    self.touched[index] = add(rows, dtype="bool", name="flix_touched")

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """The optimizer's apply, on what is in use."""
        optimizer = self.optimizer
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not optimizer.built:
                optimizer.build(trainable_variables)
        given = trainable_variables is not None
        held = trainable_variables if given else optimizer._trainable_variables
        pairs = [*zip(held, grads, strict=True)]
        counts = {id(variable): grad for variable, grad in pairs if is_mark(variable)}
        ready: list[tuple[Any, Any]] = []
        for variable, grad in pairs:
            if is_table(variable):
                if is_mark(variable) or grad is None:
                    continue
                grad = self._in_use(grad, counts, variable)
            ready.append((variable, grad))
        if not ready:  # no layer acted: a step all the same
            optimizer._iterations.assign_add(1)
            return
        self.own.apply(optimizer, [grad for _, grad in ready], [variable for variable, _ in ready])
        self.rows.clear()  # of a traced step

    def _in_use(self, grad: Any, counts: dict[int, Any], table: Any) -> Any:
        """A table's gradient, with zeros where it is not in use; notes which rows are."""
        mark = table.flix_mark
        if id(mark) not in counts:
            raise ConfigError(
                f"the optimizer trains {table.path} without {mark.path}, whose gradient tells which features acted; "
                "give it all of model.trainable_variables"
            )
        index = self.optimizer._get_variable_index(table)
        count = counts[id(mark)]
        count = ops.zeros(mark.shape, "float32") if count is None else count
        used = ops.logical_and(ops.not_equal(count, 0), ops.arange(mark.shape[0]) > 0)[:, None]
        if index in self.touched:
            used = ops.logical_or(used, self.touched[index].value)
            self.touched[index].assign(used)
        self.rows[index] = used
        return ops.where(used, grad, ops.zeros_like(grad))

    def _use_weight_decay(self, variable: Any) -> bool:
        """Tables decay in :meth:`update_step`, by row."""
        index = self.optimizer._get_variable_index(variable)
        if is_table(self.optimizer._trainable_variables[index]):
            return False
        return bool(self.own._use_weight_decay(self.optimizer, variable))

    def _apply_weight_decay(self, variables: Any) -> None:
        """The optimizer's, which may not be given nothing."""
        if others := [variable for variable in variables if not is_table(variable)]:
            self.own._apply_weight_decay(self.optimizer, others)

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        """The optimizer's, which on torch updates all at once; tables by :meth:`update_step`."""
        pairs = [*zip(grads, trainable_variables, strict=True)]
        if others := [pair for pair in pairs if not is_table(pair[1])]:
            self.own._backend_update_step(
                self.optimizer, [grad for grad, _ in others], [v for _, v in others], learning_rate
            )
        for grad, variable in pairs:
            if is_table(variable):
                self.update_step(grad, variable, learning_rate)

    def view(self, variable: Any, chosen: Any, unique_id: Any = None) -> Any:
        """The rows in use of a variable that has the table's rows."""
        return Rows(variable, chosen[:, 0] if len(variable.shape) == 1 else chosen, unique_id)

    def whole_view(self, variable: Any, chosen: Any) -> Any:
        """A variable of another shape, which is touched if any row is in use."""
        return Rows(variable, ops.any(chosen))

    def _chosen(self, index: int) -> Any:
        """What is in use of a table at its turn."""
        if index not in self.touched:
            return self.rows[index]
        use = ops.copy(self.touched[index].value)  # assigning may be in place
        self.touched[index].assign(ops.zeros_like(use))
        return use

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The optimizer's update_step; of a table, on the rows in use."""
        optimizer = self.optimizer
        index = optimizer._get_variable_index(variable)
        if not is_table(optimizer._trainable_variables[index]):
            self.own.update_step(optimizer, gradient, variable, learning_rate)
            return
        chosen = self._chosen(index)
        steps = self.view(self.steps[index], chosen)
        table = self.view(variable, chosen, optimizer._var_key(variable))
        decay = getattr(optimizer, "adam_weight_decay", optimizer.weight_decay)
        if decay is not None and self.own._use_weight_decay(optimizer, variable):
            rate = ops.cast(decay, table.dtype) * ops.cast(optimizer.learning_rate, table.dtype)
            table.assign_sub(table.value * rate)
        shadow, slots = self._on_rows(index, steps, chosen)
        self.own.update_step(shadow, gradient, table, learning_rate)
        steps.assign_add(1)
        for held in (table, steps, *slots):
            held.write()

    def _on_rows(self, index: int, steps: Any, chosen: Any) -> tuple[Any, list[Any]]:
        """A stand-in for the optimizer whose slots of one variable are some of their rows."""
        optimizer = self.optimizer
        shape = tuple(optimizer._trainable_variables[index].shape)
        shadow = object.__new__(self.own)
        state = shadow.__dict__
        state.update(optimizer.__dict__)
        slots: list[Any] = []
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
            held = self.view(slot, chosen) if by_row else self.whole_view(slot, chosen)
            slots.append(held)
            state[name] = [*value[:index], held, *value[index + 1 :]]
        if self.own.__name__ == "Muon" and optimizer.adam_velocities[index] is None:
            raise ConfigError(
                "Muon orthogonalises whole matrices, which the features' tables are not; give it "
                "exclude_layers=['flix_'], so that it trains them as AdamW does"
            )
        state["gradient_accumulation_steps"] = None
        state["_iterations"] = steps.value if elementwise else optimizer.iterations
        for name in self.METHODS:
            state.pop(name, None)
        self._known(state)
        return shadow, slots

    def _known(self, state: dict[str, Any]) -> None:
        """Let a stand-in know variables by what stands for them."""
        own = self.optimizer._var_key
        state["_var_key"] = lambda v: v.flix_id if isinstance(v, Rows) else own(v)
