"""The start of a run in several processes: they agree on what they train, and begin with the same values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flix._version import __version__
from flix.backends.torch.heads import base_parameters
from flix.backends.torch.state import FlixState
from flix.core.config.agreeing import digest, disagreement
from flix.core.errors import ConfigError
from flix.core.features.names import written


def host_group(group: Any) -> Any:
    """A process group of the same processes for tensors in host memory, where what is said needs no device.

    Every process of the group must call this at the same place.
    """
    if "cpu:" in dist.get_backend_config(group) or not dist.is_gloo_available():
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def described(model: nn.Module, state: FlixState) -> dict[str, Any]:
    """What all processes must have in common, in plain data."""
    bank = state.bank
    held = bank.held()
    sizes = dict(zip(bank.layout.places, bank.layout.shapes, strict=True))
    shapes = {
        path: [s.kind, s.d_in, s.d_out, *([s.experts] if s.experts else [])]
        for path, s in sizes.items()
    }
    base = {name: [*p.shape] for name, p in base_parameters(model)}
    return {
        "flix": __version__,
        "model": type(model).__name__,
        **state.config.to_dict(),
        "layers": shapes,
        "frozen features": [written(bank.features[i]) for i, p in held.items() if not p.requires_grad],
        "dtypes of features": {written(bank.features[i]): str(p.dtype) for i, p in held.items()},
        "base": base,
        "trained heads": [name for name, p in base_parameters(model) if p.requires_grad],
        "dtypes of heads": {n: str(p.dtype) for n, p in base_parameters(model) if p.requires_grad},
    }  # fmt: skip


def agree(description: dict[str, Any], group: Any) -> int:
    """See that all processes of a group give the same description; returns the bytes that this process sent.

    Raises:
        ConfigError: they do not, in every process; it names what differs, and in which ranks.
    """
    own = torch.frombuffer(bytearray(digest(description)), dtype=torch.uint8)
    own = own.to(device_for(group))
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    if all(torch.equal(other, own) for other in found):
        return own.nbytes
    # Every process sees the same digests, so that each of them comes here.
    whole: list[Any] = [None] * len(found)
    dist.all_gather_object(whole, description, group=group)
    raise ConfigError(
        f"the processes do not train the same: {disagreement(whole)}. Give every process the same model, "
        "configuration and frozen features before reduce_features or shard_features"
    )


def make_equal(tensors: Sequence[Tensor], group: Any, host: Any) -> int:
    """Give every process the first one's values of some tensors; returns the bytes that this process handed on.

    Digests are compared, and what differs anywhere is broadcast.

    Args:
        tensors: the same kinds in every process.
        group: the processes.
        host: the group for tensors in host memory.
    """
    plain = [t for t in tensors if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta"]  # fmt: skip
    plain = [t for t in plain if t.layout == torch.strided]
    own = _digests(plain).to(device_for(host))
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(host))]
    dist.all_gather(found, own, group=host)
    unlike = torch.stack([(other != found[0]).any(1) for other in found]).any(0)
    sent, source = own.nbytes, dist.get_process_group_ranks(group)[0]
    for place in unlike.nonzero().flatten().tolist():
        value = plain[place].detach()
        whole = value.contiguous()
        dist.broadcast(whole, source, group=host if value.device.type == "cpu" else group)
        with torch.no_grad():
            plain[place].copy_(whole)
        sent += whole.nbytes
    return sent


def device_for(group: Any) -> torch.device:
    """A device whose tensors a group can send."""
    config = dist.get_backend_config(group)
    if "cpu:" in config:
        return torch.device("cpu")
    kind = config.split(":")[0]
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _digests(tensors: Iterable[Tensor]) -> Tensor:
    """Two whole numbers for each tensor, int64 ``[n, 2]``: sums of its words, plain and by their places."""
    weights: dict[torch.device, Tensor] = {}
    found = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = (
            flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.data_ptr() % 4 == 0 else flat
        )
        piece = weights.get(tensor.device)
        if piece is None:
            rng = np.random.default_rng(0).integers(1, 1 << 31, 1 << 16, np.int64)
            piece = weights[tensor.device] = torch.from_numpy(rng | 1).to(tensor.device)
        rest = len(words) % len(piece)
        sizes = [len(piece)] * (len(words) // len(piece)) + [rest] * (rest > 0)
        sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        for number, part in enumerate(words.split_with_sizes(sizes)):
            sums[0] += part.sum(dtype=torch.int64)
            sums[1] += (2 * number + 1) * (part.to(torch.int64) * piece[: len(part)]).sum()
        found.append(sums)
    if not found:
        return torch.zeros(0, 2, dtype=torch.int64)
    return torch.stack([sums.cpu() for sums in found])
