"""Where a batch's rows lie in a tensor, followed from the model's inputs through the operations of one forward.

Vision models cut images into windows, and video models clips into frames, and put them into the first dimension, each
row's in turn: ``[B * windows, ...]``. A size tells nothing of such an order. So rows are followed: through operations
known to keep them, one by one; any other, and rows are lost there, until an adapted layer gets a plain batch. Index i
of a dimension of ``B * k`` that holds rows belongs to row ``i // k``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of the shape of their first input, or that to which it is broadcast: dimensions keep their places from the right.
_ALIKE = _words(
    """abs add addcmul alpha_dropout batch_norm bfloat16 bitwise_and celu clamp clamp_max clamp_min clone contiguous cos
    cpu cuda detach div double dropout dropout1d dropout2d dropout3d elu eq erf exp expand expand_as expm1 feature_dropout
    float floor_divide gelu glu group_norm gt half hardsigmoid hardswish hardtanh iadd idiv imul instance_norm isub
    itruediv layer_norm le leaky_relu lerp log log1p log_softmax log_sigmoid logical_and logical_or logsigmoid lt
    masked_fill maximum minimum mish mul nan_to_num native_layer_norm ne neg normalize pad pow prelu radd reciprocal relu
    relu6 repeat requires_grad rmul rms_norm round rpow rrelu rsqrt rsub rtruediv scaled_dot_product_attention selu
    sigmoid sign silu sin softmax softmin softplus softsign sqrt square sub tanh tanhshrink threshold to truediv type
    type_as where"""
)
# Products, whose first dimensions are those of the first factor, or of the second where that one is followed alone.
_PRODUCTS = _words("matmul bmm linear")
# Of batches of images and sequences, in their first dimension.
_LOCAL = _words(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d fold grid_sample interpolate max_pool1d max_pool2d max_pool3d pixel_shuffle pixel_unshuffle unfold
    upsample"""
)
_RESHAPES = _words("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as")
_REDUCTIONS = _words("mean sum amax amin max min std var prod logsumexp argmax")
_PARTS = _words("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split")
_JOINS = _words("cat concat concatenate stack")
_LIKE = _words("to type_as expand_as view_as reshape_as")  # a second tensor gives its form alone


class Notes:
    """What is noted of tensors, as long as they live: a watched forward holds none that a plain one would let go."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def __setitem__(self, tensor: Tensor, note: Any) -> None:
        self._held[id(tensor)] = (weakref.ref(tensor), note)

    def __getitem__(self, tensor: Tensor) -> Any:
        """The note; None where there is none."""
        held = self._held.get(id(tensor))  # may be that of a tensor that was there before
        return held[1] if held is not None and held[0]() is tensor else None

    def drop(self, tensor: Tensor) -> None:
        """Forget a tensor's note."""
        self._held.pop(id(tensor), None)


class Lineage:
    """The tensors of one forward that hold rows, and in which dimension.

    Args:
        rows: B, two or more; with fewer nothing is followed.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows if rows > 1 else 0
        self._held = Notes()

    def start(self, tensors: Iterable[Any], origin: Any = None) -> None:
        """Take tensors ``[B, ...]`` for a batch, of some origin."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[0] == self.rows:
                self._note(tensor, 0, origin)

    def made(self, y: Tensor, origin: Any = None) -> None:
        """Note the output of an adapted layer, which took its rows to be in the first dimension."""
        if self.rows and y.dim() and y.shape[0] and y.shape[0] % self.rows == 0:
            self._note(y, 0, origin)

    def of(self, x: Tensor) -> int | None:
        """The dimension that holds a tensor's rows, if it is known."""
        held = self._held[x]
        return None if held is None else int(held[0])

    def origin(self, x: Tensor) -> Any:
        """What a tensor is made of: the layer that gave each row its own of what is one for all in the plain model, or
        what :meth:`start` was told; None for others.
        """
        held = self._held[x]
        return None if held is None else held[1]

    def follow(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Note where the results of an operation have their rows."""
        if not self.rows or not self._held:
            return
        made = [t for t in (result if isinstance(result, tuple | list) else [result]) if _tensor(t)]
        stem = name.strip("_")
        if stem in _JOINS:
            given = [*args[0]] if args and isinstance(args[0], tuple | list) else []
        else:
            given = [t for t in (*args, *kwargs.values()) if _tensor(t)]
        given = given[:1] if stem in _LIKE else given
        if not made or not given:
            return
        places = [self.of(t) for t in given]
        source = next((i for i, place in enumerate(places) if place is not None), None)
        if source is None:
            return
        found = self._kept(stem, given, places, source, args[1:], kwargs, made)
        origin = self.origin(given[source])
        for tensor in made:
            if found is None or not found < tensor.dim() or tensor.shape[found] % self.rows:
                self._held.drop(tensor)  # changed in place by what does not keep rows
            else:
                self._note(tensor, found, origin)

    def _note(self, tensor: Tensor, dim: int, origin: Any = None) -> None:
        self._held[tensor] = (dim, origin)

    def _kept(
        self,
        stem: str,
        given: list[Any],
        places: list[int | None],
        source: int,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        made: list[Any],
    ) -> int | None:
        """The dimension of an operation's results that has the rows of its followed input; None if it is not known."""
        t, d, y = given[source], places[source], made[0]
        assert d is not None
        named = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
        if stem in _ALIKE:
            padded = len(args[0]) // 2 if stem == "pad" and args else 0
            kept = self._agree(given, places) and d < t.dim() - padded
            return _from_right(t, d, y) if kept and (stem != "pad" or args) else None
        if stem in _PRODUCTS:
            kept = source < 2 and min(g.dim() for g in given[:2]) > 1
            kept = kept and d < t.dim() - (1 if source == 0 else 2)
            return _from_right(t, d, y) if kept and self._agree(given[:2], places[:2]) else None
        if stem == "addmm":
            return 0 if source == 1 and d == 0 else None
        if stem in _LOCAL:
            return 0 if source == 0 and d == 0 and y.shape[0] == t.shape[0] else None
        if source != 0 and stem not in _JOINS:
            return None
        if stem in _RESHAPES:
            return self._reshaped(t, d, y)
        if stem in ("transpose", "swapaxes", "swapdims"):
            a, b = (kwargs.get(f"dim{i}", args[i] if len(args) > i else None) for i in (0, 1))
            return _swapped(d, a, b, t.dim())
        if stem == "permute":
            order = kwargs.get("dims", args[0] if args and not isinstance(args[0], int) else args)
            turned: list[int] = [dim % t.dim() for dim in order]
            return turned.index(d) if d in turned else None
        if stem in _JOINS:
            dim = (named or 0) % y.dim()
            same = all(g.dim() == t.dim() for g in given)
            if not same or not self._agree(given, places):
                return None
            if stem == "stack":
                return d + int(dim <= d)
            return d if dim != d else None
        if stem == "unbind":
            return _dropped(d, (named or 0) % t.dim())
        if stem == "select":
            return _dropped(d, args[0] % t.dim()) if len(args) == 2 else None
        if stem == "narrow":
            return d if len(args) == 3 and args[0] % t.dim() != d else None
        if stem in _PARTS:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return d if dim % t.dim() != d else None
        if stem == "roll":
            dims = kwargs.get("dims", args[1] if len(args) > 1 else None)
            return d if dims and d not in _dims(dims, t.dim()) else None
        if stem == "repeat_interleave":  # each row's copies in turn, where it is along the rows
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            times = kwargs.get("repeats", args[0] if args else None)
            return d if isinstance(dim, int) and isinstance(times, int) else None
        if stem in _REDUCTIONS:
            if named is None or not isinstance(named, int | tuple | list):
                return None
            dims = _dims(named, t.dim())
            return None if d in dims else d - sum(i < d for i in dims) * (y.dim() < t.dim())
        if stem == "getitem":
            return _indexed(d, args[0], t.dim())
        return None

    def _agree(self, given: list[Any], places: list[int | None]) -> bool:
        """Whether all followed inputs have their rows in the same dimension, counted from the right."""
        held = {g.dim() - d for g, d in zip(given, places, strict=True) if d is not None}
        return len(held) == 1

    def _reshaped(self, t: Tensor, d: int, y: Tensor) -> int | None:
        """Where the rows lie after a reshape: behind as many elements as before, and evenly."""
        if t.numel() != y.numel():
            return None
        before = math.prod(t.shape[:d])
        for dim, size in enumerate(y.shape):
            if math.prod(y.shape[:dim]) == before and size and size % self.rows == 0:
                return dim
        return None


def _tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _from_right(t: Tensor, d: int, y: Tensor) -> int | None:
    dim = y.dim() - (t.dim() - d)
    return dim if dim >= 0 and y.shape[dim] == t.shape[d] else None


def _swapped(d: int, a: Any, b: Any, count: int) -> int | None:
    if not isinstance(a, int) or not isinstance(b, int):
        return None
    a, b = a % count, b % count
    return b if d == a else a if d == b else d


def _dropped(d: int, dim: int) -> int | None:
    return None if dim == d else d - (dim < d)


def _dims(given: Any, count: int) -> set[int]:
    return {dim % count for dim in ([given] if isinstance(given, int) else given)}


def _indexed(d: int, index: Any, count: int) -> int | None:
    """Where rows lie in ``t[index]``, if all of them are in it, in order."""
    if isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() == 1:
        return d if bool(index.all()) else None
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not (p is None or p is ... or type(p) in (int, slice)) for p in parts):
        return None
    used = sum(p is not None and p is not ... for p in parts)
    if ... not in parts:
        parts.append(...)
    at = parts.index(...)
    parts[at : at + 1] = [slice(None)] * (count - used)
    dim, place = 0, 0
    for part in parts:
        if part is None:
            place += 1
        elif dim == d:
            return place if part == slice(None) else None
        else:
            place += type(part) is slice
            dim += 1
    return None
