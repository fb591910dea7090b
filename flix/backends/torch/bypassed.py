"""No adapted layer that never acts (docs/specification.md §5.1.9): models that read a kernel and skip its layer.

The first uncompiled forward of each form (training, gradients, several rows, which keywords) is watched: torch shows a
function mode every operation with its arguments. A layer whose kernel went into one although the layer was not called
is an error. Layers that were just not reached (an unused decoder, an expert without tokens, layer drop) are none, and
neither is a look at a kernel's dtype or device. What is not watched costs a layer one look at its routing.

The same eyes see tokens that are gathered from rows, as experts get them, and windows cut out of rows (see ``rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flix.backends import messages
from flix.backends.torch.layer import KERNELS, Adapted, FlixLayer, flix_layers
from flix.backends.torch.lineage import Lineage, Notes
from flix.backends.torch.routing import ActiveRouting, AnyRouting, Base
from flix.backends.torch.rows import MEDIA

# Results that have a tensor's form and nothing of its values.
_LIKE = frozenset(("type_as", "expand_as", "view_as", "reshape_as", "result_type", "can_cast"))
_PLACED_BACK = ("index_add", "index_copy", "index_put", "scatter", "masked_scatter")
_LOOKUPS = frozenset(("embedding", "embedding_bag", "__getitem__", "index_select", "gather"))


class Watch(TorchFunctionMode):
    """What one forward does with the adapted layers and their kernels.

    Attributes:
        called: places of the layers that ran.
        origins: of the layers' outputs, by place, as ``lineage`` knows them.
        of_batch: whether the layers' outputs are made of the batch's values, by place.
        lineage: where rows lie in its tensors.
    """

    def __init__(self, model: nn.Module, routing: ActiveRouting) -> None:
        super().__init__()
        self.model, self.rows = model, routing.lead[0] if routing.lead else 0
        self.tokens = self.rows * (routing.length or 1)
        self.lineage = Lineage(self.rows if len(routing.lead) == 1 else 0)
        self.called: set[int] = set()
        self.origins: dict[int, Any] = {}
        self.of_batch: dict[int, bool] = {}
        self.used: set[int] = set()
        self._gathered: dict[int, Tensor] = {}
        self._packed, self._batch = Notes(), Notes()
        self._turned: dict[int, Tensor] = {}
        self._owners: dict[int, list[Adapted]] = {}
        self._known: dict[int, Any] = {}
        self._look()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        tensors = list(_tensors((args, kwargs.values())))
        made = next(_tensors((result,)), None)
        if made is not None:
            name = getattr(func, "__name__", "")
            for tensor in tensors:
                if isinstance(tensor, nn.Parameter):
                    self._use(tensor, name, first=bool(args) and tensor is args[0])
            if any(self._batch[t] for t in tensors) and not _without_values(name):
                self.take(_tensors((result,)))
            if self.rows:
                self._follow(name, args, kwargs, tensors, made)
                self.lineage.follow(name, args, kwargs, result)
        return result

    def _look(self) -> None:
        """Note whose kernels the model's parameters are now: sharding and offloading exchange them."""
        self._owners.clear()
        others = set()
        for module in self.model.modules():
            for buffer in module._buffers.values():
                self._known[id(buffer)] = buffer
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                self._known[id(parameter)] = parameter  # kept, so that no other gets its id
                owner = module if isinstance(module, FlixLayer) and name == "weight" else None
                owner = owner or vars(module).get(KERNELS, {}).get(name)
                if owner is not None:
                    self._owners.setdefault(id(parameter), []).append(owner)
                else:
                    others.add(id(parameter))
        for shared in others & self._owners.keys():
            del self._owners[shared]  # a tied head or the like uses it in its own right

    def _use(self, parameter: nn.Parameter, name: str, first: bool) -> None:
        if id(parameter) not in self._known:
            self._look()
            self._known[id(parameter)] = parameter
        if _without_values(name) or (name == "to" and not first):
            return
        for layer in self._owners.get(id(parameter), ()):
            # An embedding's kernel may be a tied head, which keeps the base's; looking it up is the layer's business.
            if layer.flix_kind != "embedding" or name in _LOOKUPS:
                self.used.add(layer.flix_place)

    def gathered(self, x: Tensor) -> bool:
        """Whether a layer's input holds tokens gathered from rows, or those of all rows one after the other."""
        joined = self.rows > 1 and x.shape[:1] == (1,) and self.taken(x)
        return joined or id(x) in self._gathered or bool(self._packed[x])

    def begin(self, inputs: Iterable[Any]) -> None:
        """Look at the model's inputs: which are rows, and which hold the patches of all rows, one after the other."""
        given = [value for value in inputs if isinstance(value, Tensor)]
        # Of as many positions as rows it is not known which come first.
        self.lineage.start(x for x in given if x.dim() != 3 or x.shape[1] != self.rows)
        self.take(x for x in given if x.dim() > 1 and x.shape[0] == self.rows > 1)
        for x in given:
            others = {1, self.rows}.isdisjoint(x.shape[:1]) and x.shape[1:2] != (self.rows,)
            if x.dim() == 2 and x.is_floating_point() and others:
                self._packed[x] = True

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that are made of the batch's values."""
        for tensor in tensors:
            self._batch[tensor] = True

    def taken(self, x: Tensor) -> bool:
        """Whether a tensor is made of the batch's values."""
        return bool(self._batch[x])

    def spread(self, x: Tensor) -> bool:
        """Whether a layer's input has several entries of its first dimension for each row, one row's in turn."""
        return self.lineage.of(x) == 0 and x.shape[0] > self.rows

    def set_rows_first(self, x: Tensor) -> None:
        """Note that a tensor has its rows first, as a module says that knows what it is given."""
        self._turned.pop(id(x), None)
        self.lineage.made(x)

    def turned(self, x: Tensor) -> bool:
        """Whether a layer's input has the sequence first, and the rows after it."""
        return id(x) in self._turned

    def _turn(self, name: str, args: Any, tensors: list[Tensor], made: Tensor) -> None:
        """Note tensors whose first two dimensions have changed places, and what is made of them."""
        source = tensors[0]
        if name in ("transpose", "swapaxes", "swapdims"):
            turns = {d % source.dim() for d in args[1:3]} == {0, 1}
        elif name == "permute":
            dims = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else args[1:]
            turns = tuple(dims[:2]) == (1, 0)
        else:
            turns = False
        if turns:
            if id(source) not in self._turned and source.shape[0] == self.rows:
                self._turned[id(made)] = made
        elif any(id(t) in self._turned and t.shape[:2] == made.shape[:2] for t in tensors):
            self._turned[id(made)] = made

    def _follow(
        self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], made: Tensor
    ) -> None:
        """Note tensors of tokens that were gathered, and what is made of them one by one."""
        if made.dim() == 0 or name.startswith(_PLACED_BACK) or _without_values(name):
            return
        if made.dim() > 1 and tensors:
            self._turn(name, args, tensors, made)
        if any(self._packed[t] and t.shape[0] == made.shape[0] for t in tensors):
            self._packed[made] = True
        chosen = False
        if tensors and name == "__getitem__" and len(args) > 1:
            chosen = self._chosen(tensors[0], args[1])
        elif tensors and name == "index_select" and _given(args, kwargs, 1, "dim") == 0:
            chosen = self._chosen(tensors[0], _given(args, kwargs, 2, "index"))
        elif tensors and name == "masked_select":
            chosen = True
        if chosen or any(id(t) in self._gathered and _still(t, made) for t in tensors):
            self._gathered[id(made)] = made

    def _chosen(self, source: Tensor, index: Any) -> bool:
        """Whether an index picks rows or tokens by their contents: not each row in turn, as poolers do."""
        first = index[0] if isinstance(index, tuple) and index else index
        known = source.shape[0] in (self.rows, self.tokens) or self.lineage.of(source) == 0
        layer = self.lineage.origin(source)
        if isinstance(layer, Adapted) and self.lineage.of(source) == 0:
            raise messages.one_for_all(layer.flix_name)
        if id(source) in self._known or not known:
            return False  # a table, and no tokens
        if not isinstance(first, Tensor) or first.dim() == 0:
            return False
        if first.dtype in (torch.bool, torch.uint8):
            first = first.nonzero()[:, 0]
        if first.dim() != 1:
            return False
        everything = torch.arange(len(first), device=first.device)
        each = len(first) == source.shape[0] and bool(torch.equal(first, everything))
        return not (each or (source.shape[0] == self.rows and _in_turn(first, self.rows)))

    def bypassed(self) -> list[str]:
        """Paths of the layers whose kernels were used without calling them."""
        places = self.used - self.called
        return [path for path, layer in flix_layers(self.model) if layer.flix_place in places]


def _without_values(name: str) -> bool:
    return name in _LIKE or name.endswith("_like") or name.startswith("new_")


def _still(tokens: Tensor, made: Tensor) -> bool:
    count = tokens.shape[0]
    return made.shape[0] == count or made.shape[:2] == (1, count)


def _in_turn(first: Tensor, rows: int) -> bool:
    """Whether tokens come from all rows in order, as many from each."""
    each, rest = divmod(len(first), rows)
    if rest or not each:
        return False
    return bool(torch.equal(first, torch.arange(rows, device=first.device).repeat_interleave(each)))


def _given(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments, in lists and tuples, too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | type({}.values())):
            yield from _tensors(value)


def run(
    model: Any, routing: AnyRouting | Base, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """A model's forward, watched if it is the first of its form.

    Raises:
        TargetError: adapted layers whose kernels the model uses without calling them, or which stand inside PEFT's.
    """
    if not isinstance(routing, ActiveRouting) or routing.watch is not None:
        return forward(model, *args, **kwargs)
    several = routing.lead[0] > 1 if routing.lead else None
    form = (type(model).__qualname__, model.training, torch.is_grad_enabled(), several, *kwargs)
    seen = model.flix_state.forms
    if form in seen:
        return forward(model, *args, **kwargs)
    if torch.compiler.is_compiling() or _compiled(model):
        return forward(model, *args, **kwargs)
    with _watched(model, routing) as watch:
        if routing.batch == watch.rows:
            watch.begin((*args, *kwargs.values()))
        if routing.media is not None:
            watch.lineage.start([routing.media.values], MEDIA)
        result = forward(model, *args, **kwargs)
    if found := watch.bypassed():
        raise messages.bypassed(found)
    seen.add(form)
    return result


@contextmanager
def _watched(model: nn.Module, routing: ActiveRouting) -> Iterator[Watch]:
    watch = Watch(model, routing)
    routing.watch, kept = watch, routing.tokens
    routing.tokens = {}  # layers that kept something for a token would not say that they ran
    try:
        with watch:
            yield watch
    finally:
        routing.watch, routing.tokens = None, kept


def _compiled(model: nn.Module) -> bool:
    """Whether parts of a model are compiled: a mode would be in the way of their compiler."""
    return any(
        module._compiled_call_impl is not None
        or type(module).__name__ == "OptimizedModule"
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
