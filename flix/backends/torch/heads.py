"""Trained heads: parameters of the base that were unfrozen are saved with the features.

``adapt`` freezes the whole base. A classifier head, which starts from random values, is unfrozen by hand and trains
with the features; an adapter without it would be of no use. It goes into the adapter's file under the names of
``model.named_parameters()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flix.backends.torch.attention import attention_of
from flix.backends.torch.experts import experts_of
from flix.backends.torch.layer import KERNELS, flix_layers
from flix.backends.torch.parameters import BANK, set_values, whole
from flix.backends.torch.patches.models import state_of
from flix.core.adapter.described import Head
from flix.core.adapter.heads import Place, check_head, modules_of_heads

Model = TypeVar("Model")
_TAKES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def trained_heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that belong to an adapted model's adapter, by name.

    Those that require gradients, and those that did when the model was last saved or loaded: a head that is frozen
    while a new language is added stays part of the adapter. A parameter that several modules share has one name, the
    first.

    Raises:
        TargetError: the model is not adapted.
    """
    known = set(state_of("trained_heads", model).heads)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in base_parameters(model):
        if id(parameter) not in seen and (parameter.requires_grad or name in known):
            found[name] = parameter
        seen.add(id(parameter))
    return found


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter but the features', under every name that it has."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(BANK + "."):
            yield name, parameter


def head_places(model: nn.Module) -> dict[str, Place]:
    """The base's parameters by name, and the layers whose kernel each is: by identity, for kernels may be tied."""
    kernels: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for weight in (vars(module).get("flix_kernel"), module._parameters.get("weight")):
            if weight is not None and weight.ndim > 1:
                kernels.setdefault(id(weight), []).append(path)
        for name in experts_of(module)[0] or attention_of(module)[0]:
            kernel: Any = vars(module).get(KERNELS, {}).get(name, module)
            for weight in (vars(kernel).get("flix_kernel"), module._parameters[name]):
                if weight is not None:
                    kernels.setdefault(id(weight), []).append(f"{path}.{name}")
    return {
        name: Place(tuple(p.shape), kernels.get(id(p), ()), p.dtype in _TAKES)
        for name, p in base_parameters(model)
    }


def heads(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Head]:
    """The trained heads of an adapted model. Buffers (running statistics) are no heads."""
    known = dict(base_parameters(model))
    found = trained_heads(model) if names is None else {name: known[name] for name in names}
    for name, parameter in found.items():
        check_head(name, Place(tuple(parameter.shape), takes=parameter.dtype in _TAKES), ())
    # An adapted kernel is refused as a head; frozen then, as the message says, it is to be none.
    kernels = {id(getattr(layer, "weight", None)) for _, layer in flix_layers(model)}
    state_of("save", model).heads = tuple(n for n, p in found.items() if id(p) not in kernels)
    return {name: as_head(on_host(parameter)) for name, parameter in found.items()}


def put_heads(model: Model, heads: Mapping[str, Head]) -> Model:
    """Give parameters these values and let them train."""
    assert isinstance(model, nn.Module)
    for name in heads:
        _make_own(model, name)
    parameters = dict(base_parameters(model))
    for name, head in heads.items():
        set_values(parameters[name], as_tensor(head))
        parameters[name].requires_grad_(True)
    put = {id(parameters[name]) for name in heads}
    state = state_of("load", model)
    names = (name for name, p in parameters.items() if id(p) in put)
    state.heads = tuple({*state.heads, *names})
    return model


def as_head(value: Tensor) -> Head:
    """A tensor on the host as files hold it: numpy lacks bfloat16, and keeps its bits."""
    dtype = _TAKES[value.dtype]
    if dtype == "BF16":
        return Head(dtype, value.view(torch.int16).numpy().view(np.uint16))
    return Head(dtype, value.numpy())


def as_tensor(head: Head) -> Tensor:
    """A file's head as a tensor."""
    if head.dtype == "BF16":
        return torch.from_numpy(head.values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(head.values)


_sharing: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def shares(*models: nn.Module) -> None:
    """Note that the parameters of these models' bases may be those of others."""
    _sharing.update(models)


def shared_heads(model: nn.Module) -> list[str]:
    """Names of the base's parameters that train, and that another model has, too."""
    others = {id(p) for other in _sharing if other is not model for p in other.parameters()}
    if model not in _sharing or not others:
        return []
    return [n for n, p in base_parameters(model) if p.requires_grad and id(p) in others]


def _make_own(model: nn.Module, name: str) -> None:
    """Give a model a parameter of its own where another model has the same one, under all names that it has."""
    parameters = dict(base_parameters(model))
    shared = parameters[name]
    if model not in _sharing or not any(
        p is shared for other in _sharing if other is not model for p in other.parameters()
    ):
        return
    own = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    for path in [other for other, p in parameters.items() if p is shared]:
        module, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(module), attribute, own)


def on_host(parameter: Tensor) -> Tensor:
    """A copy of a parameter's values on the host, gathered if it is sharded."""
    return whole(parameter.detach()).cpu().clone().contiguous()


def whole_modules(model: nn.Module) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The modules that hold a model's trained heads, and all that is in them, as PEFT has them (``modules_to_save``).

    Returns:
        The values of each module's state, by the module's path and by their names inside it.

    Raises:
        AdapterError: a trained parameter that no such module holds.
    """
    parameters = {name: id(parameter) for name, parameter in base_parameters(model)}
    adapted = [path for path, _ in flix_layers(model)]
    return {
        path: {
            name: on_host(value).float().numpy()
            for name, value in model.get_submodule(path).state_dict().items()
        }
        for top in modules_of_heads(trained_heads(model), parameters, adapted)
        for path in _callable(model, top)
    }


def _callable(model: nn.Module, path: str) -> Iterator[str]:
    """A module, or those that it holds if it is no more than a list or dictionary of them, which PEFT takes none of."""
    module = model.get_submodule(path)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for name, _ in module.named_children():
            yield from _callable(model, f"{path}.{name}")
    elif any(True for _ in module.parameters()):
        yield path
