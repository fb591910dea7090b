"""Where rows lie in a tensor: what is followed is true of its values, and what may mix rows is let go."""

from __future__ import annotations

import weakref

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from flix.backends.torch.lineage import Lineage, Notes  # noqa: E402

B = 4


class Following(TorchFunctionMode):
    def __init__(self, x):
        super().__init__()
        self.lineage = Lineage(B)
        self.lineage.start([x])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.lineage.follow(getattr(func, "__name__", ""), args, kwargs or {}, result)
        return result


def followed(op, x):
    """What an operation gives, and the dimension that is said to hold its rows."""
    with Following(x) as mode:
        y = op(x)
    return y, mode.lineage.of(y)


def rows_first():
    """``[4, 8, 4, 6]``: every entry is its row's number."""
    return torch.arange(B).view(B, 1, 1, 1).expand(B, 8, 4, 6).double().contiguous()


KEPT = {
    "windows": (0, lambda x: x.view(B, 4, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)),
    "columns": (1, lambda x: x[:, :4].transpose(0, 1).reshape(B, -1)),
    "windows and back": (0, lambda x: x.view(16, 2, 4, 6).flatten(1).view(B, 8, 4, 6)),
    "heads first": (1, lambda x: x.reshape(B, 8, 2, 2, 6).permute(2, 0, 1, 3, 4)),
    "heads in the rows": (0, lambda x: x.transpose(1, 2).reshape(B * 4, 8, 6)),
    "one of three": (0, lambda x: x.reshape(B * 4, 2, 4, 6).permute(1, 0, 2, 3).unbind(0)[1]),
    "second after all": (1, lambda x: x.permute(1, 0, 2, 3)),
    "merged behind": (1, lambda x: x.permute(2, 0, 1, 3).reshape(4, B * 8, 6)),
    "copies in turn": (0, lambda x: x.repeat_interleave(3, dim=0)),
    "copies of columns": (0, lambda x: x.repeat(1, 2, 1, 1)),
    "rolled": (0, lambda x: x.view(B * 2, 4, 4, 6).roll(shifts=(1, 1), dims=(1, 2))),
    "chunk": (0, lambda x: x.chunk(2, dim=1)[1]),
    "split": (0, lambda x: x.split(3, 1)[2]),
    "slice": (0, lambda x: x[:, ::2, None, ..., 1:]),
    "picked": (0, lambda x: x[:, 2]),
    "from the end": (1, lambda x: x.transpose(0, 1)[..., 0]),
    "selected": (0, lambda x: x.transpose(0, 1).select(0, 3)),
    "narrow": (0, lambda x: x.narrow(1, 2, 3)),
    "joined": (0, lambda x: torch.cat((x[:, :1], x), dim=1)),
    "joined at the end": (0, lambda x: torch.cat([x, x], -1)),
    "stacked": (1, lambda x: torch.stack([x, x], 0)),
    "mean": (0, lambda x: x.mean((1, 2))),
    "sum of the first": (0, lambda x: x.transpose(0, 1).mean(0)),
    "kept dimensions": (1, lambda x: x.transpose(0, 1).amax(dim=0, keepdim=True)),
    "broadcast": (0, lambda x: torch.zeros(6) + x),
    "in place": (0, lambda x: x.clone().mul_(1)),
    "cast": (0, lambda x: x.float().to(torch.float64)),
    "all of a mask": (0, lambda x: x[torch.ones(B, dtype=torch.bool)]),
    "pad": (0, lambda x: F.pad(x, (0, 2, 0, 1), mode="replicate")),
    "pool": (0, lambda x: F.max_pool2d(x, 2)),
    "squeezed": (0, lambda x: x[:, :1].squeeze(1).unsqueeze(-1)),
    "expanded": (1, lambda x: x[None].expand(5, *x.shape)),
    "product": (0, lambda x: x @ torch.eye(6, dtype=x.dtype)),
    "second factor": (0, lambda x: torch.eye(4, dtype=x.dtype) @ x),
    "linear": (0, lambda x: F.linear(x, torch.eye(6, dtype=x.dtype))),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_followed_is_true_of_the_values(name):
    place, op = KEPT[name]
    y, found = followed(op, rows_first())
    assert found == place
    each = y.shape[found] // B
    for i in range(y.shape[found]):
        assert (y.select(found, i) == i // each).all()


LOST = {
    "copies behind each other": lambda x: x.repeat(2, 1, 1, 1),
    "copies without a dimension": lambda x: x.repeat_interleave(2),
    "rolled rows": lambda x: x.roll(1, 0),
    "rolled flat": lambda x: x.roll(1),
    "flipped": lambda x: x.flip(0),
    "some rows": lambda x: x[[1, 0, 3, 2]],
    "rows by index": lambda x: x.index_select(0, torch.tensor([1, 0, 3, 2])),
    "rows by mask": lambda x: x.view(B * 8, -1)[torch.arange(B * 8) % 3 != 0],
    "a mask of some": lambda x: x[torch.tensor([True, False, True, True])],
    "half": lambda x: x[:2],
    "one row": lambda x: x[1],
    "backwards": lambda x: torch.flip(x, dims=[0, 1]),
    "joined rows": lambda x: torch.cat([x, x]),
    "joined with others": lambda x: torch.cat(
        [x, x.transpose(0, 1)[:4, :, :, :].expand(4, 4, 4, 6)], 1
    ),
    "sum over rows": lambda x: x.sum(0),
    "sum over all": lambda x: x.sum(),
    "sorted": lambda x: x.sort(0, descending=True)[0],
    "shifted by padding": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)),
    "second factor alone": lambda x: torch.ones(B, B, dtype=x.dtype) @ x[:, 0, 0],
    "einsum": lambda x: torch.einsum("b...->...b", x),
    "uneven": lambda x: x.reshape(6, -1),
    "unbound": lambda x: x.unbind(0)[0],
    "chunks of rows": lambda x: x.chunk(2)[0],
    "changed in place": lambda x: x.clone().copy_(x.flip(0)),
}


@pytest.mark.parametrize("name", LOST)
def test_what_may_mix_rows_is_let_go(name):
    assert followed(LOST[name], rows_first())[1] is None


def test_a_batch_of_one_row_is_not_followed():
    lineage = Lineage(1)
    x = torch.zeros(1, 2)
    lineage.start([x])
    lineage.made(x)
    assert lineage.of(x) is None


def test_a_layers_output_has_its_rows_first_again():
    lineage, y = Lineage(B), torch.zeros(B * 3, 2)
    lineage.made(y, "origin")
    assert lineage.of(y) == 0 and lineage.origin(y) == "origin"
    lineage.follow("view", (y, 3, B, 2), {}, made := y.view(3, B, 2))
    assert lineage.of(made) is None  # 3 is no multiple of the rows


def test_no_tensor_is_held():
    """A first forward of a large model would hold all that it computes."""
    x, notes = torch.zeros(B, 2), Notes()
    with Following(x) as mode:
        y = x + 1
        gone = weakref.ref(y)
        notes[y] = "note"
        assert mode.lineage.of(y) == 0 and notes[y] == "note"
        del y
        assert gone() is None
        for _ in range(50):  # others get its id
            other = torch.empty(1)
            assert mode.lineage.of(other) is None and notes[other] is None
