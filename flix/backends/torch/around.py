"""Layers whose own forward is called, and to whose output each row's update is added.

Quantised linears (torchao, bitsandbytes, GPTQ, AWQ and others) and subclasses of ``nn.Linear`` with a forward of their
own (Falcon's, clipped ones) compute their base map as only they know how. flix never looks at their kernel: it calls
their forward, and adds ``Σ w s B_f (A_f x)`` (docs/specification.md §1.1) to what it gives.
"""

from __future__ import annotations

import copyreg
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flix.backends.torch.added import added
from flix.backends.torch.layer import FlixLayer
from flix.backends.torch.rows import noted, rows_of
from flix.core.adapter.adapter import LayerShape
from flix.core.errors import TargetError

_KEPT = "_flix_around"  # the class's own attribute that holds its subclass

_QUANTISED = frozenset(
    {
        "QuantLinear",  # GPTQ's, by its various kernels
        "BaseQuantLinear",
        "WQLinear",  # AWQ's
        "WQLinear_GEMM",
        "WQLinear_GEMV",
        "WQLinear_GEMVFast",
        "WQLinear_Exllama",
        "WQLinear_ExllamaV2",
        "WQLinear_IPEX",
        "HQQLinear",
        "EetqLinear",
        "QuantizedLinear",  # AQLM's
        "HiggsLinear",
        "BitLinear",
        "FP8Linear",
    }
)
"""Names of classes of quantised linears that are no subclasses of ``nn.Linear``."""


def encloses(module: nn.Module) -> bool:
    """Whether a module is a linear map with a forward of its own, around which features can act."""
    if not isinstance(getattr(module, "in_features", None), int):
        return False
    if not isinstance(getattr(module, "out_features", None), int) or any(module.children()):
        return False
    if (
        type(module) is nn.Linear
    ):  # whose kernel is a tensor of another class, which its operations know
        return type(module.weight.data) is not Tensor
    if isinstance(module, nn.Linear):
        return _gives_vectors(module)
    return not _QUANTISED.isdisjoint(cls.__name__ for cls in type(module).__mro__)


def _gives_vectors(module: nn.Linear) -> bool:
    """Whether a linear layer's own forward takes vectors to vectors of the size that it says, as a trial shows.

    Routers that are subclasses of ``nn.Linear`` give a tuple, and others more than they say. Taken for granted where
    the kernel is quantised or has no values here.
    """
    if (
        type(module).forward is nn.Linear.forward
        or module.weight.is_meta
        or not readable(module.weight)
    ):
        return True
    try:
        with torch.no_grad():
            y = type(module).forward(module, module.weight.new_zeros(2, module.in_features))
    except Exception:  # it wants other things than a batch of vectors
        return False
    return isinstance(y, Tensor) and y.shape == (2, module.out_features)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear map whose kernel plain operations cannot read."""
    kernel = getattr(module, "weight", None)
    return encloses(module) and not (isinstance(kernel, Tensor) and readable(kernel))


def readable(kernel: Tensor) -> bool:
    """Whether a kernel holds floating-point numbers that plain operations read.

    Torchao keeps quantised kernels as tensors of classes of its own, in layers that are ``nn.Linear`` still.
    """
    held = kernel.data if isinstance(kernel, nn.Parameter) else kernel
    plain = type(held) is Tensor or hasattr(held, "device_mesh")  # or sharded over processes
    return plain and kernel.is_floating_point() and kernel.dtype.itemsize > 1


class FlixAround(FlixLayer):
    """What a linear layer with a forward of its own becomes; see the module.

    Its strategies are those of :class:`flix.backends.torch.FlixLinear`; in compiled graphs gather takes the place of
    ``"fused"``.
    """

    in_features: int
    out_features: int

    @classmethod
    def shape_of(cls, layer: Any) -> LayerShape:
        return LayerShape(layer.in_features, layer.out_features, cls.flix_kind)

    @property
    def d_in(self) -> int:
        return self.in_features

    @property
    def d_out(self) -> int:
        return self.out_features

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; copies and pickles name the layer's own class instead.
        made = super().__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            made = (_new_around, (type(self).flix_own, *made[1][1:]), *made[2:])  # type: ignore[attr-defined]
        return made

    def _enclosed(self, args: Any, kwargs: Any, x: Tensor, features: Any, weights: Any) -> Tensor:
        """The layer's own output plus each row's update."""
        base = type(self).flix_own.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        routing = self._routing(features, weights)
        if routing is None:
            return base  # type: ignore[no-any-return]
        self._check(x, base)
        x, count, length, routing = rows_of(self, x, routing, trailing=1)
        if x.shape[:-1] != base.shape[:-1]:  # one row of tokens for all
            base = base.expand(*x.shape[:-1], base.shape[-1])
        rows = x.reshape(count, length, x.shape[-1]).to(base.dtype)
        own, rate = base.reshape(count, length, base.shape[-1]), self._dropped()
        rows = F.dropout(rows, rate) if rate else rows
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                y = added(self, rows, own, routing)
        else:  # the context costs as much as a launch
            y = added(self, rows, own, routing)
        return noted(self, y.view(*x.shape[:-1], self.d_out), routing)

    def _check(self, x: Any, base: Any) -> None:
        named = f"layer {self.flix_name!r} ({type(self).__name__})"
        fits = (
            isinstance(x, Tensor)
            and isinstance(base, Tensor)
            and x.shape[-1:] == (self.d_in,)
            and base.shape == (*x.shape[:-1], self.d_out)
        )
        if not fits:
            given, got = (
                list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (x, base)
            )
            raise TargetError(
                f"{named} says that it maps {self.d_in} features to {self.d_out}, but gave {got} for {given}; "
                "it is not a linear map to which features can be added: leave it out of "
                "target_modules"
            )
        if x.requires_grad and torch.is_grad_enabled() and not base.requires_grad:
            raise TargetError(
                f"{named} records no gradient of its input, so features of the layers before it would not be trained; "
                "do not adapt those layers, or use a quantisation that trains"
            )


def around(cls: type[nn.Module]) -> type[FlixAround]:
    """The class that layers of a class become."""
    if _KEPT in vars(cls):
        return vars(cls)[_KEPT]  # type: ignore[no-any-return]

    def forward(
        self: Any, *args: Any, flix_features: Any = None, flix_weights: Any = None, **kwargs: Any
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        return self._enclosed(args, kwargs, x, flix_features, flix_weights)

    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    members = {
        "forward": forward,
        "flix_own": cls,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    made = type(cls.__name__, (FlixAround, cls), members)
    setattr(cls, _KEPT, made)
    return made


def _new_around(own: type[nn.Module], *args: Any) -> Any:
    cls = around(own)
    return cls.__new__(cls, *args)
