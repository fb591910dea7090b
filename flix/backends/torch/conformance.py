"""What the torch backend shows the conformance kit (``flix_conformance``) beside its verbs: numpy in, numpy out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flix.backends.torch import loops, primitives, search_weights, ways
from flix.backends.torch.experts import site
from flix.backends.torch.kernels.choice import INTERPRETED
from flix.backends.torch.layers import FlixConv1D

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch, Experts, Layer  # type: ignore[import-not-found]


class OwnForward(nn.Linear):
    """A subclass of ``nn.Linear`` with a forward of its own, around which features act."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Sending(nn.Module):
    """Transformers' experts with a router that goes by a position's place alone."""

    def __init__(self, experts: nn.Module, sent: Tensor, share: Tensor) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("sent", sent)
        self.register_buffer("share", share)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        place = torch.arange(len(tokens)) % len(self.sent)  # type: ignore[arg-type]
        y = self.experts(tokens, self.sent[place], self.share[place])  # type: ignore[index]
        return y.view(x.shape)  # type: ignore[no-any-return]


def _plain(layer: Layer) -> nn.Module:
    made: Any
    values, dtype = torch.from_numpy(layer.kernel), getattr(torch, layer.dtype)
    d_in, d_out = values.shape
    if layer.kind == "embedding":
        made = nn.Embedding(d_in, d_out, dtype=dtype)
    elif layer.form == "conv1d":
        # By name and late: the backend stands without transformers.
        made = import_module("transformers.pytorch_utils").Conv1D(d_out, d_in).to(dtype)
    else:
        kind = OwnForward if layer.form == "own forward" else nn.Linear
        made = kind(d_in, d_out, bias=layer.bias is not None, dtype=dtype)
        values = values.t()
    if layer.form == "convolution":
        made = nn.Conv1d(d_in // 2, d_out, 2, 2, bias=layer.bias is not None, dtype=dtype)
        values = values.reshape(made.weight.shape)
    with torch.no_grad():
        made.weight.copy_(values)
        if layer.bias is not None:
            made.bias.copy_(torch.from_numpy(layer.bias))
    return made  # type: ignore[no-any-return]


class Convolving(nn.Sequential):
    """One convolution over sequences in which a position's vector is a patch of two places."""

    def forward(self, x: Tensor) -> Tensor:
        patches = x.reshape(*x.shape[:2], -1, 2).permute(0, 2, 1, 3)
        y = super().forward(patches.flatten(2))  # type: ignore[no-untyped-call]
        return y.transpose(1, 2)  # type: ignore[no-any-return]


def _nested(layers: Sequence[tuple[str, nn.Module]]) -> nn.Sequential:
    """Layers one after another; what stands before a path's first dot is a module of its own."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for head, group in groupby(layers, lambda layer: layer[0].partition(".")[0]):
        inner = [(path.partition(".")[2], layer) for path, layer in group]
        parts[head] = _nested(inner) if inner[0][0] else inner[0][1]
    return nn.Sequential(parts)


def _x(batch: Batch) -> Tensor:
    x = torch.from_numpy(batch.x)
    return x.to(getattr(torch, batch.dtype)) if x.is_floating_point() else x


def _routing(batch: Batch) -> dict[str, Tensor]:
    given = {"flix_features": batch.ids, "flix_weights": batch.weights}
    return {name: torch.from_numpy(value) for name, value in given.items() if value is not None}


def _gradient(value: Tensor | None) -> NDArray[Any] | None:
    """A gradient as numpy; zeros where the output does not depend on the value."""
    if value is None or not value.requires_grad:
        return None
    return (torch.zeros_like(value) if value.grad is None else value.grad).double().numpy()  # type: ignore[no-any-return]


def _turned(weight: Tensor, layer: Any) -> Tensor:
    """A kernel as ``[d_in, d_out]``; Conv1D, adapted or not, has it so."""
    if isinstance(layer, nn.Conv1d):
        return weight.flatten(1).t()
    turned = isinstance(layer, nn.Linear) and not isinstance(layer, FlixConv1D)
    return weight.t() if turned else weight


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every array that an operation makes, and keeps the largest one's bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(found):
            if isinstance(value, Tensor) and not value._is_view():
                self.size = max(self.size, value.untyped_storage().nbytes())
        return found


class TorchHarness:
    """See ``flix_conformance.harness.Harness``."""

    dtypes = ("float32", "bfloat16", "float64")
    # The kernels take part where Triton interprets them: TRITON_INTERPRET=1. They have no float64.
    strategies = ("auto", "gather", "masked", "single", *(("fused",) if INTERPRETED else ()))
    id_dtypes = ("int32", "int64", "int16", "int8", "uint8")
    excluded = (("fused", "float64"),)
    kinds = ("linear", "embedding")
    nested = True
    forms = ("own forward", "convolution", *(("conv1d",) if find_spec("transformers") else ()))

    def plain(self, layers: Sequence[Layer], x: NDArray[Any]) -> nn.Sequential:
        made = [(layer.path, _plain(layer)) for layer in layers]
        if layers[0].form == "convolution":
            return Convolving(OrderedDict(made))
        return _nested(made)

    if find_spec("transformers"):

        def experts(self, experts: Experts, x: NDArray[Any]) -> tuple[nn.Sequential, str, str]:
            """Mixtral's, whose kernels stand as ``[E, d_out, d_in]``."""
            mixtral = import_module("transformers.models.mixtral")
            count, size, inner = experts.down.shape[0], experts.down.shape[2], experts.down.shape[1]
            config = mixtral.MixtralConfig(
                num_local_experts=count,
                hidden_size=size,
                intermediate_size=inner,
                num_experts_per_tok=experts.sent.shape[1],
            )
            made = mixtral.modeling_mixtral.MixtralExperts(config)
            kernels = {"gate_up_proj": experts.up, "down_proj": experts.down}
            for name, kernel in kernels.items():
                held = torch.from_numpy(kernel).transpose(1, 2).contiguous()
                setattr(made, name, nn.Parameter(held.to(getattr(torch, experts.dtype))))
            sent, share = torch.from_numpy(experts.sent), torch.from_numpy(experts.share)
            router = Sending(made, sent, share.to(held.dtype))
            model = nn.Sequential(OrderedDict({experts.path: router}))
            up, down = (f"{experts.path}.experts.{name}" for name in kernels)
            return model, up, down

    def __init__(self) -> None:
        self.held: dict[str, tuple[NDArray[Any], Tensor]] = {}

    def _same(self, batch: Batch) -> dict[str, Tensor]:
        """The routing; arrays that come again are the tensors of before, changed in place, as users' may be."""
        found = _routing(batch)
        for name, array in (("flix_features", batch.ids), ("flix_weights", batch.weights)):
            if array is None:
                continue
            if name not in self.held or self.held[name][0] is not array:
                self.held[name] = (array, found[name].clone())
            found[name] = self.held[name][1].copy_(found[name])
        return found

    @torch.no_grad()
    def call(self, model: Any, batch: Batch, path: str | None = None) -> tuple[NDArray[Any], str]:
        module = model if path is None else model.get_submodule(path)
        threaded = threading.current_thread() is not threading.main_thread()
        y = module(_x(batch), **(_routing(batch) if threaded else self._same(batch)))
        return y.double().numpy(), str(y.dtype).removeprefix("torch.")

    def evaluated(self, model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
        try:
            return self.call(model.eval(), batch)
        finally:
            model.train()

    def gradients(self, model: Any, batch: Batch, dy: NDArray[Any]) -> dict[str, Any]:
        x, routing = _x(batch), _routing(batch)
        weights = routing.get("flix_weights")
        for value in (x, weights):
            if value is not None and value.is_floating_point():
                value.requires_grad_()
        y = model(x, **routing)
        if isinstance(
            model[0], Sending
        ):  # gradients that could be differentiated again are the same
            seed = torch.from_numpy(dy).to(y.dtype)
            (again,) = torch.autograd.grad(y, x, seed, create_graph=True)
            (once,) = torch.autograd.grad(y, x, seed, retain_graph=True)
            bound = 1e-4 * float(once.abs().max())
            assert torch.allclose(again, once, 1e-4, bound), "a differentiable gradient differs"
        if y.requires_grad:
            y.backward(torch.from_numpy(dy).to(y.dtype))
        layer, bank = model[0], model.flix_state.bank
        vectors = {i: _gradient(p) for i, p in bank.held().items()}
        if isinstance(layer, Sending):
            pairs: Any = {
                path: {bank.features[i]: bank.layout.views(v, i, n) for i, v in vectors.items()}
                for path, n in bank.layout.places.items()
            }
            return {"x": _gradient(x), "weights": _gradient(weights), "pairs": pairs}
        base = layer.weight.grad
        return {
            "x": _gradient(x),
            "weights": _gradient(weights),
            "pairs": {bank.features[i]: bank.layout.views(v, i, 0) for i, v in vectors.items()},
            "base": None if base is None else _turned(base, layer).double().numpy(),
        }

    def trainer(self, model: Any, settings: AdamW) -> Callable[[Batch], None]:
        s = settings
        betas = (s.beta1, s.beta2)
        parameters = primitives.parameters(model.train())
        adamw = torch.optim.AdamW(parameters, s.lr, betas, s.eps, s.decay)

        def step(batch: Batch) -> None:
            y = model(_x(batch), **_routing(batch))
            adamw.zero_grad()
            (((y - torch.from_numpy(batch.target)) ** 2).sum() / (2 * len(batch.x))).backward()
            adamw.step()

        return step

    def compiled_forward(self, model: Any) -> Callable[[Batch], tuple[NDArray[Any], str]]:
        """The whole graph, by a compiler that makes no machine code: it is ours that is tried."""
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        return lambda batch: self.call(run, batch)

    def fit(self, model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
        """Gradients of one row after the other are accumulated, each through a checkpoint."""
        s = settings
        parameters = primitives.parameters(model.train())
        adamw = torch.optim.AdamW(parameters, s.lr, (s.beta1, s.beta2), s.eps, s.decay)
        for batch in batches:
            adamw.zero_grad()
            for row in range(len(batch.x)):
                rows = slice(row, row + 1)
                options: dict[str, Any] = {"use_reentrant": False}
                options |= {name: value[rows] for name, value in _routing(batch).items()}
                y = checkpoint(model, _x(batch)[rows], **options)
                loss = ((y - torch.from_numpy(batch.target)[rows]) ** 2).sum() / 2
                (loss / len(batch.x)).backward()
            adamw.step()

    def largest(self, model: Any, batch: Batch, dy: NDArray[Any]) -> int:
        found: Any = _Largest()  # type: ignore[no-untyped-call]
        with found:
            self.gradients(model, batch, dy)
        return int(found.size)

    def kernel(self, model: Any, path: str) -> NDArray[Any]:
        layer, name = site(model, path)
        weight = getattr(layer, name).detach()
        experts = weight.dim() == 3 and not isinstance(layer, nn.Conv1d)
        weight = weight.transpose(1, 2) if experts else _turned(weight, layer)
        return (weight.float() if weight.dtype == torch.bfloat16 else weight).numpy().copy()

    def ways(self) -> dict[str, Any]:
        return ways.ways()

    def loops(self) -> dict[str, Any]:
        return loops.loops()

    def search(self, model: Any, batch: Batch, row: Any, **options: Any) -> Any:
        target = torch.from_numpy(batch.target)

        def loss(y: Tensor, _: Any) -> Tensor:
            return ((y - target) ** 2).sum() / (2 * len(target))

        return search_weights(model, {"input": _x(batch)}, row, loss=loss, **options)

    def unfreeze(self, model: Any, path: str) -> None:
        model.get_submodule(path).requires_grad_()


harness = TorchHarness
