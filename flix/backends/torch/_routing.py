"""From the keywords of a model's forward to the routing that its layers run under."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends.torch._context import (
    ActiveRouting,
    AnyRouting,
    TracedRouting,
    Uniform,
    current,
    make_routing,
)
from flix.backends.torch._distributed import touched_by_all
from flix.backends.torch._layer import flix_layers
from flix.backends.torch._versions import version
from flix.core.errors import ConfigError, RoutingError

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_PROMPTS = ("inputs", "input_ids", "inputs_embeds", "encoder_outputs")


def unrouted(model: Any, weights: Any) -> AnyRouting | None:
    """The routing of a forward that was given none.

    That of the forward around it, or of :func:`routed`; else an error in training, and otherwise None, the base (and a
    warning).
    """
    if weights is not None:
        raise RoutingError("flix_weights was given without flix_features; weights belong to ids")
    if current.routing is not None or not is_enabled(model):
        return current.routing
    default = current.defaults.get(id(model))
    if default is not None:
        return _uniform(model, default)
    if model.training:
        raise RoutingError(
            "an adapted model was called in training without routing; pass flix_features=ids, int "
            "[batch, width], made by registry.encode(rows) (ids of -1 for rows of the base alone)"
        )
    if not torch.compiler.is_compiling():
        warnings.warn(
            "an adapted model was called without flix_features: the base model answers alone. Pass "
            "flix_features=ids, or ids of -1 if this is meant; where a keyword cannot be passed, use "
            "routed(model, row)",
            stacklevel=3,
        )
    return None


def _uniform(model: Any, default: Uniform) -> AnyRouting:
    if torch.compiler.is_compiling():
        _refuse_paged(model)
        _mark(model, default.ids)
        return default.traced()
    others = touched_by_all(model) if torch.is_grad_enabled() else None
    touched = others(default.ids.numpy()[None]) if others is not None else ()
    # The last is kept with its model, and with it its plan: generation calls at every token.
    known = vars(model).get("flix_last")
    if known is not None and known[0] is default and not touched and not model.training:
        return _paged(model, known[-1])
    routing = default.active(touched)
    if not model.training:
        vars(model)["flix_last"] = (default, routing)
    return _paged(model, routing)


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
    if isinstance(features, Tensor) and (weights is None or isinstance(weights, Tensor)):
        make_routing(model.flix_config.registry, features, weights, batch=batch)
        return {"flix_features": features, "flix_weights": weights}
    checked = make_routing(model.flix_config.registry, features, weights, batch=batch)
    ids = torch.from_numpy(checked.flat.reshape(*checked.lead, -1))
    found = checked.weights
    if found is not None and bool((found.detach().cpu()[ids >= 0] == 1).all()):
        found = None
    return {"flix_features": ids, "flix_weights": found}


def is_enabled(model: nn.Module) -> bool:
    """Whether any adapted layer of the model is switched on."""
    return any(layer.flix_enabled for _, layer in flix_layers(model))


def routing_of(
    model: Any, features: Any, weights: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    refuse_merged(model)
    batch, length = _input_shape(args, kwargs)
    if torch.compiler.is_compiling() and isinstance(features, Tensor):
        _refuse_paged(model)
        return _traced_routing(model, features, weights, batch, length)
    per_token = getattr(features, "ndim", 0) == 3
    if per_token and length is not None and not model.training and features.shape[1] > length:
        # Generation: with a cache only the newest positions are run, under the last ids given.
        features = features[:, -length:]
        weights = None if weights is None else weights[:, -length:]
    # Generation calls with the same tensors at every step; the last plan is kept with its model.
    keep = (
        not model.training
        and isinstance(features, Tensor)
        and (weights is None or (isinstance(weights, Tensor) and not weights.requires_grad))
    )
    if keep:
        state = (version(features), None if weights is None else version(weights))
        known = vars(model).get("flix_last")
        if (
            known is not None
            and known[0] is features
            and known[1] is weights
            and known[2] == state
            and known[-1].length == length
            and batch in (None, features.shape[0])
        ):
            return _paged(model, known[-1])
    config = model.flix_config
    routing = make_routing(
        config.registry,
        features,
        weights,
        batch=batch,
        length=length,
        touched=touched_by_all(model) if torch.is_grad_enabled() else None,
    )
    if keep:
        vars(model)["flix_last"] = (features, weights, state, routing)
    return _paged(model, routing)


def _paged(model: Any, routing: ActiveRouting) -> ActiveRouting:
    """The routing, with its features on the device, if the model's are paged."""
    routing.pager = vars(model).get("flix_pager")
    if routing.pager is not None:
        routing.pager.load(routing)
    return routing


def _traced_routing(
    model: Any, ids: Tensor, weights: Any, batch: int | None, length: int | None
) -> TracedRouting:
    """Inside a compiler: what shapes and dtypes tell is checked, values are not."""
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.dim() not in (2, 3):
        raise RoutingError(
            "flix_features must be integer ids of shape [batch, width] or [batch, length, width], "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    if batch is not None and ids.shape[0] != batch:
        raise RoutingError(
            f"flix_features routes {ids.shape[0]} rows, but the batch has {batch} rows"
        )
    if weights is not None and weights.shape != ids.shape:
        raise RoutingError(
            f"flix_weights must have the shape of flix_features, {list(ids.shape)}, got "
            f"{list(weights.shape)}"
        )
    registry = model.flix_config.registry
    if registry.removed:
        # As ids of no feature, which the layers make NaN: nothing can be raised in a graph.
        gone = torch.tensor(registry.removed_ids, device=ids.device, dtype=ids.dtype)
        ids = torch.where((ids[..., None] == gone).any(-1), len(registry), ids)
    _mark(model, ids)
    return TracedRouting(ids, weights, length)


def refuse_merged(model: nn.Module) -> None:
    """A model that is merged in place has one composition in its kernels."""
    if "flix_merged" in vars(model):
        raise RoutingError(
            f"flix_features was given to a model that is merged in place, with {vars(model)['flix_merged']!r}: "
            "its composition is fixed; unmerge(model) lets it route again"
        )


def _refuse_paged(model: Any) -> None:
    if vars(model).get("flix_pager") is not None:
        raise ConfigError(
            "a paged model cannot be compiled: which features a batch needs is only known when it "
            "runs; compile a model without page()"
        )


def _mark(model: Any, ids: Tensor) -> None:
    """Note in the model which features a compiled step sees; ids of no feature go where padding goes."""
    if torch.is_grad_enabled():
        count = len(model.flix_config.registry)
        slot = torch.where((ids < 0) | (ids >= count), count, ids).reshape(-1)
        model.flix_present.index_fill_(0, slot.to(torch.int64), True)
        model.flix_traced = True


def _input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int | None]:
    """Batch size and length of the input, where it is named as transformers names it."""
    for name in _INPUTS:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    if args and isinstance(args[0], Tensor) and args[0].dim() >= 2:
        return None, args[0].shape[1]
    return None, None
