"""A model with one convolution, and what its rows' own kernels give, for tests."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix.backends.torch import (  # noqa: E402
    adapt,
)
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.torch import live_pairs, randomize, routing  # noqa: E402

ROW = {"language": "swa", "task": "pos"}
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SETTINGS = {
    "plain": (2, {"kernel_size": 3}),
    "patches": (2, {"kernel_size": 2, "stride": 2}),
    "padded": (2, {"kernel_size": (3, 2), "padding": (1, 2), "stride": (2, 1), "bias": False}),
    "same": (2, {"kernel_size": (4, 3), "padding": "same"}),
    "dilated": (2, {"kernel_size": 2, "dilation": (3, 2), "padding": 2}),
    "reflected": (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "circular": (1, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "points": (2, {"kernel_size": 1}),
    "sound": (1, {"kernel_size": 4, "stride": 3}),
    "film": (3, {"kernel_size": (2, 3, 2), "stride": (1, 2, 2), "padding": (0, 1, 0)}),
}


class Net(nn.Module):
    """A convolution, and a linear layer over its channels."""

    def __init__(self, places=2, **settings):
        super().__init__()
        self.conv = KINDS[places](3, 5, **settings)
        self.out = nn.Linear(5, 2)

    def forward(self, pixel_values):
        return self.out(self.conv(pixel_values).tanh().flatten(2).mean(2))


def drawn(places, rows=4, size=7):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 3, *[size] * places, generator=generator, dtype=torch.float64)


def made(name="plain", seed=0, strategy="auto", **changes):
    places, settings = SETTINGS[name]
    torch.manual_seed(0)
    changes = {"target_modules": ["conv", "out"], **changes}
    model = adapt(Net(places, **settings).double(), config(**changes), strategy=strategy)
    randomize(model, seed, std=0.3)
    return model.eval(), drawn(places)


def by_row(model, x, rows=ROWS, layer="conv"):
    """The convolution alone, each row by a kernel of its own, and the leaves that stand for pairs and weights."""
    conv, settings = model.get_submodule(layer), model.flix_config
    pairs = {n: p.detach().clone().requires_grad_() for n, p in live_pairs(model).items()}
    ids, weights = routing(rows)
    weights = weights.double().requires_grad_()
    found = []
    for row in range(len(rows)):
        kernel = conv.weight.detach()
        for entry, number in enumerate(ids[row].tolist()):
            feature = settings.registry.features[number]
            a = pairs.get(f"{layer}.A.{feature[0]}.{feature[1]}")
            if number >= 0 and a is not None:
                b = pairs[f"{layer}.B.{feature[0]}.{feature[1]}"]
                factor = weights[row, entry] * settings.scale(layer, feature)
                kernel = kernel + factor * (b @ a).view_as(kernel)
        found.append(conv._conv_forward(x[row : row + 1], kernel, conv.bias))
    return torch.cat(found), pairs, weights


def run(model, x, rows=ROWS):
    ids, weights = routing(rows)
    return model(x, flix_features=ids, flix_weights=weights)
