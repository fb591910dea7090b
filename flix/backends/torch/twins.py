"""One layer in models of other shapes, for the conformance kit (see :mod:`.ways`): each gives what the layer gives."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flix.backends.torch import adapt, merge, primitives, route, share_base
from flix.backends.torch.conformance import Convolving
from flix.backends.torch.ways import _answer, _called, _ids, _mapped, _merged_each, _row, _x

if TYPE_CHECKING:
    from flix_conformance import Batch  # type: ignore[import-not-found]


class _Generating(nn.Sequential):
    """Gives one position after the other, as generation does: each with the routing of those before it, too."""

    def generate(self, x: Tensor, flix_features: Tensor, flix_weights: Tensor | None) -> Tensor:
        found = []
        for end in range(1, x.shape[1] + 1):
            given = (flix_features, flix_weights)
            ids, weights = (v if v is None or v.dim() < 3 else v[:, :end] for v in given)
            y = self(x[:, end - 1 : end], flix_features=ids, flix_weights=weights)
            found.append(y)
        return torch.cat(found, 1)


def generated(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """By a model's own ``generate``, whose routing is given as arrays."""
    x, floating = _x(batch), not isinstance(model[0], nn.Embedding)
    if x.dim() < 2 + floating:
        return _called(model, batch)
    plain = share_base(model)
    plain.__class__ = _Generating
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model)).eval()
    with torch.no_grad():
        return _answer(twin.generate(x, flix_features=batch.ids, flix_weights=batch.weights))


class _Flattening(nn.Sequential):
    """Makes one sequence of all rows, as models do that have no batch inside."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.dim() - (not isinstance(self[0], nn.Embedding))
        y = super().forward(x.flatten(0, tokens - 1))  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:tokens], -1)  # type: ignore[no-any-return]


def flattened(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Rows of one composition together, of which the layers see no rows."""
    if batch.ids.ndim > 2 or not len(batch.ids):
        return _called(model, batch)
    plain = share_base(model)
    plain.__class__ = _Flattening
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model))
    (ids, weights), x, found = _ids(batch), _x(batch), []
    for row in range(len(x)):
        given = [None if v is None else v[[row, row]] for v in (ids, weights)]
        with torch.no_grad():
            y = twin(x[[row, row]], flix_features=given[0], flix_weights=given[1])
        found.append(y[:1])
    return _answer(torch.cat(found))


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as Gemma's and BART's do."""

    embed_scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def scaled(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """With an embedding that doubles halves of the same values."""
    if not isinstance(model[0], nn.Embedding):
        return _called(model, batch)
    plain: Any = copy.deepcopy(share_base(model))
    plain[0].__class__ = ScaledEmbedding
    with torch.no_grad():
        plain[0].weight.mul_(0.5)
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    halves = {
        path: {feature: (a, b * 0.5) for feature, (a, b) in pairs.items()}
        for path, pairs in primitives.read(model).items()
    }
    return _called(primitives.write(twin, halves), batch)


def resized(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """With a larger vocabulary, as models of transformers are given one."""
    if not isinstance(model[0], nn.Embedding):
        return _called(model, batch)
    plain = copy.deepcopy(share_base(model))
    plain.__class__ = _Resizable
    twin: Any = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model))
    twin.resize_token_embeddings(len(twin[0].weight) + 3)
    return _called(twin, batch)


class _Resizable(nn.Sequential):
    """Takes another vocabulary as models of transformers do: by a new layer."""

    def resize_token_embeddings(self, size: int) -> nn.Module:
        old: Any = self[0]
        made = nn.Embedding(size, old.weight.shape[1], dtype=old.weight.dtype)
        with torch.no_grad():
            made.weight[: len(old.weight)] = old.weight
        setattr(self, next(iter(self._modules)), made)
        return made


class BitLinear(nn.Module):
    """Stands for the layers of quantised models that are known by their classes' names: a forward, and no kernel."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.compute_dtype = like.weight.dtype
        self.register_buffer("held", like.weight.detach().clone())
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.held, self.bias)  # type: ignore[arg-type]


def quantised(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Over a layer of a class that quantised models have, and merged into a plain one made of it."""
    if not isinstance(model[0], nn.Linear):
        return _called(model, batch)
    plain = copy.deepcopy(share_base(model))
    setattr(plain, next(iter(plain._modules)), BitLinear(plain[0]))  # type: ignore[index]
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model))
    y, _ = _merged_each(twin, batch, dequantize=True)
    found = _called(twin, batch)
    _alike(y, found[0], batch, "merged")
    _alike(_mapped(twin, batch)[0], found[0], batch, "mapped")
    _alike(_slope(twin, batch), _slope(model, batch), batch, "the gradient of x")
    return found


def _slope(model: Any, batch: Batch) -> NDArray[Any]:
    """The gradient of x that could be differentiated again, and is that of one backward."""
    x, (ids, weights) = _x(batch).requires_grad_(), _ids(batch)
    y = model(x, flix_features=ids, flix_weights=weights)
    (again,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (once,) = torch.autograd.grad(y.sum(), x)
    first, second = (v.detach().double().numpy() for v in (again, once))
    _alike(first, second, batch, "the gradient, again,")
    return once.double().numpy()  # type: ignore[no-any-return]


def _alike(y: NDArray[Any], wanted: NDArray[Any], batch: Batch, what: str) -> None:
    bound = {"float64": 1e-9, "float32": 1e-3}.get(batch.dtype, 0.05)
    size = np.abs(wanted).max(initial=1)
    assert np.allclose(y, wanted, bound, bound * size), f"{what} differs"


class _Windowed(nn.Sequential):
    """Cuts each row's positions into windows, which go through the layers as if they were rows, in two orders."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        # As models cut: every step leaves the values as they are, and rows where they can be followed.
        x = torch.stack(x.unbind(1), 1).permute(1, 0, 2).transpose(0, 1)
        x = torch.cat(x.chunk(length, 1), 1).roll(1, 1).roll(-1, 1).narrow(1, 0, length)
        x = x.unsqueeze(2)[:, :, 0].select(1, 0)[:, None] + x - x[:, :1]
        windows = x.repeat_interleave(2, 0).view(batch, 2, length, size).mean(1)
        windows = windows.matmul(torch.eye(size, dtype=x.dtype)).reshape(batch * length, 1, size)
        y = super().forward(windows)  # type: ignore[no-untyped-call]
        return y.view(batch, length, -1)  # type: ignore[no-any-return]


def in_windows(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Row by row of windows, as models of images have them."""
    if batch.x.ndim != 3 or batch.ids.ndim > 2 or 0 in batch.x.shape:
        return _called(model, batch)
    plain = share_base(model)
    plain.__class__ = _Windowed
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    return _called(primitives.write(twin, primitives.read(model)), batch)


class _Attending(nn.Module):
    """An attention whose queries have one key each, so that what it gives is the projection of the value."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, 1, batch_first=False, dtype=dtype)
        with torch.no_grad():
            self.attention.out_proj.weight.copy_(torch.eye(size))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for t in range(x.shape[1]):
            one = x[:, t : t + 1].transpose(0, 1)
            masks: dict[str, Any] = {"need_weights": bool(t % 2)}
            if t:
                masks["attn_mask"] = torch.zeros(1, 1, dtype=torch.bool)
                masks["key_padding_mask"] = torch.zeros(len(x), 1, dtype=x.dtype)
            found.append(self.attention(one, one, one, **masks)[0].transpose(0, 1))
        return torch.cat(found, 1)


def attending(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """As the projection of values in an attention, whose sizes are filled up with zeros."""
    layer, path = model[0], "attention.in_proj_weight"
    if not isinstance(layer, nn.Linear) or batch.x.ndim != 3 or batch.ids.ndim > 2:
        return _called(model, batch)
    d_out, d_in = layer.weight.shape
    size = max(d_in, d_out)
    plain = _Attending(size, layer.weight.dtype)
    rows = slice(2 * size, 2 * size + d_out)
    with torch.no_grad():
        plain.attention.in_proj_weight[2 * size :].zero_()
        plain.attention.in_proj_weight[rows, :d_in] = layer.weight
        if layer.bias is not None:
            plain.attention.in_proj_bias[rows] = layer.bias
    ((_, own),) = primitives.read(model).items()
    pairs, ranks = {}, dict.fromkeys(model.flix_config.registry.features, 0)
    for feature, (a, b) in own.items():
        wide_a, wide_b = np.zeros((len(a), size), a.dtype), np.zeros((3 * size, len(a)), b.dtype)
        wide_a[:, :d_in], wide_b[rows] = a, b
        pairs[feature], ranks[feature] = (wide_a, wide_b), len(a)
    config = replace(model.flix_config, target_modules=(path,), ranks=ranks, rank_pattern={})
    twin = primitives.write(adapt(plain, config, strategy=model.flix_state.strategy), {path: pairs})
    x = nn.functional.pad(_x(batch), (0, size - d_in))
    ids, weights = _ids(batch)
    with torch.no_grad():
        y = twin.eval()(x, flix_features=ids, flix_weights=weights)[..., :d_out]
        twin.train()
        for row, own_ids in enumerate(batch.ids):
            own_weights = None if batch.weights is None else batch.weights[row]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # what else reads a kernel
                merged = merge(twin, _row(model, own_ids, own_weights))
            one = merged(x[row : row + 1])[..., :d_out]
            _alike(_answer(one)[0], _answer(y[row : row + 1])[0], batch, "merged")
    return _answer(y)


def convolving(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """As a convolution, whose patches are filled up to an even size; mapped over rows as well."""
    layer, path = model[0], next(iter(model._modules))
    if not isinstance(layer, nn.Linear) or batch.x.ndim != 3 or batch.ids.ndim > 2:
        return _called(model, batch)
    d_out, d_in = layer.weight.shape
    size, dtype = d_in + d_in % 2, layer.weight.dtype
    plain = nn.Conv1d(size // 2, d_out, 2, 2, bias=layer.bias is not None, dtype=dtype)
    with torch.no_grad():
        kernel = nn.functional.pad(layer.weight, (0, size - d_in))
        plain.weight.copy_(kernel.view(plain.weight.shape))
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
    ((_, own),) = primitives.read(model).items()
    pairs = {f: (np.pad(a, ((0, 0), (0, size - d_in))), b) for f, (a, b) in own.items()}
    base = Convolving(OrderedDict({path: plain}))
    twin = adapt(base, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, {path: pairs})
    filled = np.pad(batch.x, ((0, 0), (0, 0), (0, size - d_in)))
    y, name = _called(twin, replace(batch, x=filled))
    ids, weights = (None if v is None else v[:1] for v in _ids(batch))
    first = torch.from_numpy(filled[0]).to(dtype).view(len(filled[0]), -1, 2)
    with torch.no_grad(), route(model.flix_config.registry, ids, weights):
        one = twin[0](first.transpose(0, 1).flatten(1))  # without a batch
    _alike(_answer(one.t())[0], y[0], batch, "a row alone")
    _alike(_mapped(twin, replace(batch, x=filled))[0], y, batch, "mapped")
    return y, name


def offloaded(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """With the base in the host's memory, whose parts come where they are used, by accelerate's hooks."""
    copied = copy.deepcopy(model)
    import_module("accelerate").cpu_offload(copied, torch.device("cpu"))
    return _called(copied, batch)
