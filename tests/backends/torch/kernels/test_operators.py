"""The operators, as torch knows them: their shapes, dtypes and gradients are what they say."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from flix.backends.torch.kernels.operators import routed_linear, routed_linear_backward  # noqa: E402
from flix.backends.torch.kernels.routes import routes  # noqa: E402
from tests.helpers.kernels import DEVICE, needs_kernels  # noqa: E402

pytestmark = needs_kernels


def _operands(strategy, length=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    ids = torch.tensor([[0, 1], [2, -1], [1, 2]], device=DEVICE)
    rows, _, factor, order, starts = routes(ids, (2, 1, 3), (1.0, 0.5, 2.0), False, True)
    a = [random(r, 7) for r in (2, 1, 3)]
    b = [random(r, 6) for r in (2, 1, 3)]
    return [
        random(3, length, 7),
        random(7, 6),
        random(6),
        factor,
        rows,
        order,
        starts,
        a,
        b,
        strategy,
    ]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("strategy", ["fused", "gather", "masked"])
def test_opcheck_of_the_routed_map(strategy, length):
    if strategy != "fused" and DEVICE == "cuda":
        pytest.skip("host strategies are for the CPU")
    operands = _operands(strategy, length)
    for place in (0, 3):
        operands[place].requires_grad_()
    for tensor in (*operands[7], *operands[8]):
        tensor.requires_grad_()
    torch.library.opcheck(routed_linear, tuple(operands))


@pytest.mark.parametrize("strategy", ["fused", "gather"])
def test_opcheck_of_the_backward(strategy):
    if strategy != "fused" and DEVICE == "cuda":
        pytest.skip("host strategies are for the CPU")
    x, kernel, _, scale, rows, order, starts, a, b, _ = operands = _operands(strategy)
    y, h = routed_linear(*operands)
    torch.library.opcheck(
        routed_linear_backward,
        (torch.ones_like(y), x, kernel, scale, rows, order, starts, h, a, b, strategy, True, True),
    )
