"""From the keywords of a model's call to the routing that its layers run under."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch import scopes
from flix.backends.torch.distributed.agreement import touched_by_all
from flix.backends.torch.distributed.wrappers import refuse as refuse_wrappers
from flix.backends.torch.media import media_of
from flix.backends.torch.routing import (
    BASE,
    AnyRouting,
    Base,
    TracedRouting,
    Uniform,
    as_tensors,
    current,
    make_routing,
    tracing,
    transforming,
)
from flix.backends.torch.state import FlixState
from flix.core.errors import ConfigError, RoutingError
from flix.core.features.routing import Routing, check_form

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_MEDIA = ("pixel_values", "input_values", "input_features")  # rows, but no length
_PROMPTS = ("inputs", "input_ids", "inputs_embeds", *_MEDIA, "encoder_outputs")


CALL = "model(**inputs, flix_features=ids)"
"""How adapted models are called, as messages say it."""


def routing_of(
    model: Any, features: Any, weights: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AnyRouting | Base:
    """The routing that a call of an adapted model puts in force.

    Raises:
        RoutingError: routing that breaks a rule, or none.
    """
    state: FlixState = model.flix_state
    scope = scopes.in_force(state)
    if scope is scopes.OFF:
        return BASE
    refuse_trace()
    if not tracing():
        refuse_wrappers(state)
    if features is None:
        return _unrouted(model, state, weights, scope)
    _refuse_replica(model)
    refuse_folded(state)
    batch, length = _input_shape(model, args, kwargs)
    counted = batch is not None
    if not counted and isinstance(features, Tensor | np.ndarray | Routing):
        batch, counted = _told_by_sizes(model, len(features), args, kwargs)
    if transforming():
        features, weights = as_tensors(state.config.registry, features, weights)
    if tracing() and isinstance(features, Tensor):
        return _traced(state, features, weights, batch, length, counted)
    per_token = getattr(features, "ndim", 0) == 3
    if per_token and length is not None and not model.training and features.shape[1] > length:
        # Generation: with a cache only the newest positions are run, under the last ids given.
        features = features[:, -length:]
        weights = None if weights is None else weights[:, -length:]
    others = touched_by_all(model, state) if torch.is_grad_enabled() else None
    # Generation calls with the same tensors at every step.
    keep = (
        not model.training
        and others is None
        and isinstance(features, Tensor)
        and (weights is None or (isinstance(weights, Tensor) and not weights.requires_grad))
    )
    made_of: tuple[Any, ...] = (features, weights, None, None, length, batch, counted)
    if keep:
        versions = (_version(features), None if weights is None else _version(weights))
        made_of = (features, weights, *versions, length, batch, counted)
        known = state.last
        if (
            known is not None
            and all(a is b or (type(a) is int and a == b) for a, b in zip(known, made_of))  # noqa: B905
        ):
            routing = known[-1].enter(state)
            routing.media = media_of(model, args, kwargs, len(routing.flat))
            return routing  # type: ignore[no-any-return]
    routing = make_routing(
        state.config.registry,
        features,
        weights,
        batch=batch,
        length=length,
        touched=others,
    )
    routing.counted = counted
    routing.media = media_of(model, args, kwargs, len(routing.flat))
    if keep:
        state.last = (*made_of, routing)
    return routing.enter(state)


def _unrouted(
    model: Any, state: FlixState, weights: Any, scope: Uniform | None
) -> AnyRouting | Base:
    """The routing of a forward that was given none: that of the forward around it, or of :func:`routed`.

    Raises:
        RoutingError: there is neither.
    """
    if weights is not None:
        raise messages.weights_alone()
    if current.routing is not None:
        return current.routing
    if state.folded is not None:
        return BASE
    if scope is not None:
        return _uniform(model, state, scope)
    raise messages.unrouted_model(CALL, "routed(model, row)")


def _refuse_replica(model: Any) -> None:
    if getattr(model, "_is_replica", False):
        raise RoutingError(
            "nn.DataParallel copies a model for each call, and its copies lose the features' parameters; use "
            "torch.nn.parallel.DistributedDataParallel, one process for each device"
        )


def refuse_trace() -> None:
    """``torch.jit.trace`` records what one batch computes, and its routing is decided on the host."""
    # What torch.jit.is_tracing asks, which is not exported.
    if torch._C._get_tracing_state() is not None:
        raise RoutingError(
            "torch.jit.trace, and ONNX export through it, would record this batch's routing for all others; use "
            "torch.export or torch.onnx.export(dynamo=True), or trace the plain model that merge(model, row) gives"
        )


def _uniform(model: Any, state: FlixState, default: Uniform) -> AnyRouting:
    if tracing():
        _refuse_untraced(state)
        _mark(state, default.ids)
        return default.traced(state.bank)
    others = touched_by_all(model, state) if torch.is_grad_enabled() else None
    touched = others(default.ids.numpy()[None]) if others is not None else ()
    known = state.last if others is None else None
    if known is not None and known[0] is default and not model.training:
        return known[-1].enter(state)  # type: ignore[no-any-return]
    routing = default.active(touched)
    if not model.training and others is None:
        state.last = (default, routing)
    return routing.enter(state)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed, as far as it counts; inference tensors do not."""
    return -1 if tensor.is_inference() else tensor._version


def generation_routing(
    model: Any, features: Any, weights: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Routing for ``generate()``, which repeats rows for beams and samples only where they are tensors.

    Raises:
        RoutingError: routing that breaks a rule, or that has another number of rows than the prompts.
    """
    given = [kwargs.get(name) for name in _PROMPTS] + [args[0] if args else None]
    prompts = next((value for value in given if value is not None), None)
    if prompts is not None and not isinstance(prompts, Tensor):  # an encoder's output
        prompts = prompts[0] if isinstance(prompts, tuple) else prompts["last_hidden_state"]
    batch = prompts.shape[0] if isinstance(prompts, Tensor) else None
    registry = model.flix_state.config.registry
    if isinstance(features, Tensor) and (weights is None or isinstance(weights, Tensor)):
        make_routing(registry, features, weights, batch=batch)
        return {"flix_features": features, "flix_weights": weights}
    checked = make_routing(registry, features, weights, batch=batch)
    ids = torch.from_numpy(checked.flat.reshape(*checked.lead, -1))
    found = checked.weights
    if found is not None and bool((found.detach().cpu()[ids >= 0] == 1).all()):
        found = None
    return {"flix_features": ids, "flix_weights": found}


def _traced(
    state: FlixState,
    ids: Tensor,
    weights: Any,
    batch: int | None,
    length: int | None,
    counted: bool,
) -> TracedRouting:
    """Inside a compiler: what shapes and dtypes tell is checked, values are not."""
    _refuse_untraced(state)
    check_form(ids, weights, batch=batch)
    registry = state.config.registry
    if registry.removed:
        # As ids of no feature, which the layers make NaN: nothing can be raised in a graph.
        gone = torch.tensor(registry.removed_ids, device=ids.device, dtype=ids.dtype)
        ids = torch.where((ids[..., None] == gone).any(-1), len(registry), ids)
    _mark(state, ids)
    routing = TracedRouting(state.bank, ids, weights, length, batch)
    routing.counted = counted
    return routing


def refuse_folded(state: FlixState) -> None:
    """A model that is merged in place has one composition in its kernels."""
    if state.folded is not None:
        raise messages.folded_in(state.folded)


def _refuse_untraced(state: FlixState) -> None:
    if state.pager is not None:
        raise ConfigError(
            "a paged model cannot be compiled, nor run under torch.func: which features a batch needs is only known "
            "when it runs; use a model without page()"
        )
    if state.bank.sharding is not None:
        raise ConfigError(
            "a model with sharded features cannot be compiled, nor run under torch.func: which features a batch needs is "
            "only known when it runs; compile its blocks one by one, or use a model without shard_features()"
        )


def _mark(state: FlixState, ids: Tensor) -> None:
    """Note which features a compiled step sees; ids of no feature go where padding goes."""
    if torch.is_grad_enabled() and torch.compiler.is_compiling():
        count = len(state.config.registry)
        place = torch.where((ids < 0) | (ids >= count), count, ids).reshape(-1)
        present = state.bank.present
        present.index_fill_(0, place.to(present.device, torch.int64), True)
        state.traced = True


def _input_shape(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int | None, int | None]:
    """Batch size and length of the input, where it is named as transformers names it, or comes first."""
    for name in _INPUTS:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    for name in _MEDIA:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0], None
    if args and isinstance(args[0], Tensor) and args[0].dim() >= 2:
        main = getattr(model, "main_input_name", None)
        length = None if main in _MEDIA else args[0].shape[1]
        return (args[0].shape[0] if main in (*_INPUTS, *_MEDIA) else None), length
    for value in kwargs.values():
        if isinstance(value, Tensor) and value.dim() >= 3:
            return None, value.shape[1]
    return None, None


def _told_by_sizes(
    model: Any, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int | None, bool]:
    """The batch's size where inputs have other names, and whether the routing's is found among their sizes.

    It is the routing's if an input has it first, and 1 if all have one row; an input may have the sequence first, but
    not that of a plain nn.Sequential.
    """
    shapes = [v.shape for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0]
    first = {shape[0] for shape in shapes}
    if rows in first:
        return rows, True
    second = not isinstance(model, nn.Sequential) and any(
        len(shape) > 2 and shape[1] == rows for shape in shapes
    )
    return (1 if first == {1} and not second else None), second
