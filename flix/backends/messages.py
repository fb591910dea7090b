"""The errors that several backends raise, each worded once. They are returned: ``raise`` stands where it happens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flix.core.adapter.composition import Composition
from flix.core.errors import ConfigError, RoutingError, TargetError, listed
from flix.core.features.names import written


def not_adapted(verb: str, model: Any) -> TargetError:
    """A verb was given a model that is not adapted."""
    return TargetError(
        f"{verb} needs an adapted model, but this {type(model).__name__} is not; "
        "adapt(model, config) or load(model, folder) first"
    )


def adapted_already() -> TargetError:
    """A model was to be adapted twice."""
    return TargetError(
        "the model is adapted already; add features with add_feature, or adapt a fresh copy"
    )


def undropped(rate: float, paths: Collection[str] | None) -> ConfigError:
    """``lora_dropout`` where it cannot act (docs/specification.md §1.8): in these layers, or (None) in this backend."""
    why = "the layers of this backend do not support it"
    if paths is not None:
        why = f"{listed(paths, 3)} do not support it (they are experts, and those of PEFT do not either)"
    return ConfigError(
        f"lora_dropout={rate:g}, dropout on the low-rank path, is not possible: {why}; "
        + ("leave them out (exclude_modules), or " if paths is not None else "")
        + "set lora_dropout=0"
    )


def weights_alone() -> RoutingError:
    """Weights without features (docs/specification.md §5.1.2)."""
    return RoutingError(
        "flix_weights was given without flix_features; weights belong to ids, so give both"
    )


def unrouted_model(call: str, block: str = "") -> RoutingError:
    """An adapted model was called without routing (docs/specification.md §5.1.3).

    Args:
        call: how this framework's models are called with it.
        block: what gives one composition to all calls inside it, where the backend has that.
    """
    return RoutingError(
        f"an adapted model was called without routing; call it as {call}, with ids int [batch, width] made by "
        f"registry.encode(rows){_or_inside(block)}. Ids of -1, or disable(model), give the base alone"
    )


def unrouted_layer(path: str, call: str, block: str = "") -> RoutingError:
    """An adapted layer was called while no routing was in force; otherwise as :func:`unrouted_model`."""
    return RoutingError(
        f"layer {path!r} is adapted, but no routing is in force: the model was not called as a whole, or without "
        f"flix_features; call the adapted model as {call}{_or_inside(block)}. Ids of -1, or disable(model), give the "
        "base alone"
    )


def kept_by_a_cache(path: str, call: str) -> RoutingError:
    """A layer runs in a compiled function whose cache would keep the routing of this call for later ones.

    Args:
        path: the layer.
        call: how this framework's layers are called with routing.
    """
    return RoutingError(
        f"layer {path!r} runs inside a function that is compiled by itself (jit, checkpoint, "
        f"scan, cond, ...), and its "
        "cache would keep the routing of this call for later ones. Pass the module as an "
        "argument (nnx.jit, nnx.remat, nnx.scan, ...), or pass its routing: layer(x, "
        "flix_features=ids); or compile the whole call of the model, "
        f"{call}"
    )


def routed_from_around(path: str, call: str) -> RoutingError:
    """A layer runs in a compiled function under routing that was put in force around it.

    Args:
        path: the layer.
        call: how this framework's models are called with routing.
    """
    return RoutingError(
        f"layer {path!r} runs inside a function that is compiled (fit, predict, jax.jit, a loop "
        f"or branch), under routing "
        f"from around it, which that function would keep for later calls; make routing an input: {call}"
    )


def _or_inside(block: str) -> str:
    return f", or inside of {block}" if block else ""


def swallowed(module: str, path: str, call: str) -> RoutingError:
    """A part of a model was given routing, and has nothing to do with it.

    Args:
        module: the part's class.
        path: an adapted layer in it.
        call: how this framework's models are called with routing.
    """
    return RoutingError(
        f"flix_features was given to a {module} around layer {path!r}, which does not take it; call the adapted "
        f"model as {call}, or run its parts without it, under one composition for all rows"
    )


def other_registry(path: str, given: Any, own: Any) -> RoutingError:
    """A layer runs under routing that was made for another registry."""
    return RoutingError(
        f"layer {path!r} belongs to {own}, but the routing in force was made for {given}, whose ids mean other "
        "features; route each model's layers by its own registry"
    )


def traced_otherwise(name: str, what: str, now: str) -> RoutingError:
    """A function that was compiled by hand serves another kind of call than it was traced for.

    Args:
        name: the layer or model inside it.
        what: what it was traced for.
        now: what it got.
    """
    return RoutingError(
        f"a function around {name!r} was traced {what}, and is called {now}; it would answer as "
        f"it was traced. "
        "Make one function for each kind of call (ids of -1 give the base in the same function)"
    )


def changed_kernel(verb: str, what: str) -> TargetError:
    """A framework's own verb would change how an adapted layer is computed."""
    return TargetError(
        f"{verb} was called on an adapted {what}, whose features would then no longer act; "
        f"merge(model, row) first, or do it before adapt, which adapts quantized layers, and "
        f"leaves out layers with a LoRA of their own"
    )


def without_features(weights: Any, path: str, call: str) -> RoutingError:
    """An adapted layer was called without features: :func:`weights_alone` with weights, else :func:`unrouted_layer`."""
    return unrouted_layer(path, call) if weights is None else weights_alone()


def other_lead(
    path: str, given: Any, lead: Any, ways_out: bool = False, unseen: bool = False
) -> RoutingError:
    """A layer's input has other leading sizes than the routing.

    Args:
        path: the layer.
        given: the input's, ``[batch, ...]``.
        lead: the routing's: ``[batch]``, or ``[batch, length]`` by token.
        ways_out: whether to say what else can be done.
        unseen: whether the model was compiled before a plain call of it was seen.
    """
    plain = ", call the model once before it is compiled, which shows whether they are parts of each row in turn"
    what = "[batch, length]" if len(lead) == 2 else "[batch]"
    return RoutingError(
        f"layer {path!r} got an input of leading shape {_shown(given)}, but flix_features routes {what} = "
        f"{_shown(lead)}; one row of ids is needed for each row of the batch (and one for each position, "
        "where routing is per token)"
        + (f". Otherwise {_WAYS_OUT}" if ways_out else "")
        + (plain if unseen else "")
    )


def no_rows_of_places(path: str, shape: Sequence[int], by: int) -> RoutingError:
    """A convolution whose input is no batch, or under routing by token."""
    what = "features differ by token" if by == 2 else "the input is not a batch"
    return RoutingError(
        f"layer {path!r} is a convolution, whose rows are the batch's ([batch, channels, ...]), got the input {_shown(shape)}, "
        f"where {what}; give one row of ids for each row of the batch, leave the layer out when adapting "
        "(exclude_modules), or give all rows one composition"
    )


def no_batch(path: str, shape: Sequence[int]) -> RoutingError:
    """An input without a batch, under rows that differ."""
    return RoutingError(
        f"layer {path!r} got the input {_shown(shape)}, which is not a batch, but the rows of "
        f"flix_features differ; give the "
        "batch in one dimension, or all rows one composition"
    )


def doubtful_rows(path: str, given: Any, lead: Any, why: str) -> RoutingError:
    """A layer's input of which no size says whose rows it holds; otherwise as :func:`other_lead`.

    Args:
        why: what is known of the layer's inputs.
    """
    return RoutingError(
        f"layer {path!r} got an input of leading shape {_shown(given)}, and flix_features routes rows {_shown(lead)}; "
        f"{why}, so it is not known whose rows these are, even if the size fits; {_WAYS_OUT}"
    )


def one_for_all(path: str) -> RoutingError:
    """A layer's output, one for all rows in the plain model, is indexed as if it still were."""
    *_, parent, tail = ("", *path.split("."))
    chosen = repr(rf".*\b{parent}\..*") if tail.isdigit() and parent else repr([tail])
    return RoutingError(
        f"layer {path!r} gets one input for all rows of the batch, so that each row has an "
        f"output of its own, but the model then takes entries of it by an index, as from a table "
        f"of relative positions, and these would all be of one row; leave the layer out when "
        f"adapting (exclude_modules={chosen}), or give all rows one composition"
    )


def unlike_media(path: str, kind: str, without: Sequence[int], prompt: Any) -> RoutingError:
    """As many images as rows, but not one for each."""
    whose = (
        "without input_ids, flix cannot see that each row has one"
        if prompt is None
        else f"not one for each: {listed([f'row {row}' for row in without])} without any"
    )
    return RoutingError(
        f"layer {path!r} gets as many inputs of the kind {kind!r} as the batch has rows, but "
        f"{whose}, so it is not known which row each belongs to; give each row of a batch one "
        f"{kind}, leave the layer out when adapting (exclude_modules), or "
        "give all rows one composition"
    )


_WAYS_OUT = (
    "leave the layer out when adapting (exclude_modules), give all rows one composition, or, where each position has "
    "its own features, route per token, with ids [batch, length, width]"
)


def bypassed(paths: Sequence[str]) -> TargetError:
    """Adapted layers whose kernels the model uses without calling them (docs/specification.md §5.1.9)."""
    tails = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return TargetError(
        f"{listed(paths)}: adapted, but the model uses the kernel without calling the layer, so its features would never "
        f"act or train; adapt a fresh model without it, exclude_modules={tails}"
    )


def rows_differ(place: Sequence[int]) -> ConfigError:
    """Strategy "single" for rows that differ.

    Args:
        place: the row that differs, or by token the row and the position (``flix.core.strategy.union.first_unlike``).
    """
    there, first = (
        ", ".join(f"{what} {n}" for what, n in zip(("row", "position"), where, strict=False))
        for where in (place, [0] * len(place))
    )
    return ConfigError(
        f"strategy 'single' needs one composition for all rows, but {there} differs from {first}; use "
        "'auto', 'gather' or 'masked'"
    )


def folded_in(row: Mapping[str, Any]) -> RoutingError:
    """Routing for a model that is merged in place."""
    return RoutingError(
        f"flix_features was given to a model that is merged in place, with {dict(row)!r}: its composition is "
        "fixed; unmerge(model) lets it route again"
    )


def not_finite(features: Sequence[str]) -> str:
    """The warning that names features whose values are not finite."""
    return (
        f"values of {listed(features)} are NaN or infinite; the answers to rows that use them "
        f"are too, and those to other rows are not. Look with flix inspect --check, and load the "
        f"feature again or remove it"
    )


def merged(*compositions: Composition) -> RoutingError:
    """Routing for a merged copy.

    Args:
        compositions: what was merged into it, in order: each the ``active`` that the primitive ``merged`` was given.
    """
    held = ", then ".join(
        " + ".join(written(f) + ("" if weight == 1 else f" x {weight:g}") for f, weight in active)
        for active in compositions
    )
    return RoutingError(
        f"flix_features was given to a merged model; it holds the composition {held}, for all rows. "
        "Call it without flix_features, or call the adapted model that it was merged from"
    )


def no_experts(paths: Sequence[str]) -> TargetError:
    """A backend whose layers have no axis of experts is given an adapter, or sizes, of such layers."""
    return TargetError(
        f"{listed([repr(path) for path in paths], 3)}: the kernels have an axis of experts, "
        f"which this backend does not adapt; the torch backend does"
    )


def _shown(shape: Any) -> str:
    """A shape as text; sizes that a framework does not know yet included."""
    return str(list(shape)) if isinstance(shape, Sequence) else str(shape)
