"""Linear layers whose kernels transformers spreads over processes (``tp_plan``), adapted (docs/specification.md §5.2).

transformers cuts such a kernel by its outputs ("colwise") or its inputs ("rowwise"), and puts a forward on the layer
that takes and gives each process's part. That forward is called for the base. Features are whole in every process:
their sum is computed of the whole input, which a rowwise layer gathers, and a colwise layer gives its own part of it.
The way back gathers the parts of the output's gradient, so that each process finds the whole gradient of the features,
the same in all, as long as all get the same batch, as they do under tensor parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flix.backends.torch.added import added
from flix.backends.torch.layer import FlixLayer
from flix.backends.torch.routing import TracedRouting
from flix.backends.torch.rows import noted, rows_of
from flix.core.errors import ConfigError

FORWARD = "flix_sharded"
"""Under which name an adapted layer keeps the forward that transformers put on it."""


class FlixSharded(FlixLayer, nn.Linear):
    """A linear layer with a part of a kernel, plus each row's own sum of low-rank updates."""

    def forward(self, x: Tensor, flix_features: Any = None, flix_weights: Any = None) -> Tensor:
        """As :meth:`flix.backends.torch.FlixLinear.forward`, of the parts that transformers' forward takes and gives.

        Raises:
            RoutingError: no routing, or routing that does not fit x.
            ConfigError: ``lora_dropout`` in training, whose masks processes would draw apart; a compiled model.
        """
        base: Tensor = vars(self)[FORWARD](x)
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            return base
        if isinstance(routing, TracedRouting):
            raise ConfigError(
                f"layer {self.flix_name!r} is spread over processes (tp_plan), and acts in eager "
                f"mode only; compile the "
                "model without tp_plan"
            )
        if rate := self._dropped():
            raise ConfigError(
                f"lora_dropout={rate:g}: layer {self.flix_name!r} is spread over processes "
                f"(tp_plan), each of which would draw another mask; set lora_dropout=0, or train "
                f"without tp_plan"
            )
        x, count, length, routing = rows_of(self, self._whole(x), routing, trailing=1)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(count, length, self.d_in).to(base.dtype)
            y = added(self, rows, rows.new_zeros(count, length, self.d_out), routing)
        y = y.view(*x.shape[:-1], self.d_out)
        return noted(
            self, base + (y if base.shape[-1] == self.d_out else self._own_part(y)), routing
        )

    def _whole(self, x: Tensor) -> Tensor:
        """The whole input, of a part of its last dimension."""
        if x.shape[-1] == self.d_in:
            return x
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.Size((*x.shape[:-1], self.d_in))
        stride = torch.empty(shape, device="meta").stride()
        mesh = self.weight.device_mesh  # type: ignore[attr-defined]
        part = DTensor.from_local(x, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)
        return part.redistribute(placements=[Replicate()]).to_local()

    def _own_part(self, y: Tensor) -> Tensor:
        """This process's part of the last dimension."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = self.weight.device_mesh  # type: ignore[attr-defined]
        whole = DTensor.from_local(y, mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(-1)]).to_local()


def sharded(module: nn.Module) -> tuple[type[FlixSharded] | None, str]:
    """What a linear layer with a part of a kernel becomes, or None and the reason; both empty for other layers."""
    mesh = getattr(getattr(module, "weight", None), "device_mesh", None)
    if mesh is None or type(module) is not nn.Linear:
        return None, ""
    if "forward" not in vars(module):
        if not module._forward_pre_hooks:
            return None, ""
        return None, (
            "its kernel is spread over processes by hooks (parallelize_module); transformers' tp_plan can be adapted, and "
            "fully_shard after adapt"
        )
    if not getattr(module, "_is_hooked", False):
        return None, ""
    if mesh.ndim != 1:
        return (
            None,
            f"its kernel is spread over a mesh of {mesh.ndim} dimensions; a tp_plan of one can be adapted",
        )
    return FlixSharded, ""
