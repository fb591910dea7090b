"""What the GPU's section holds kernels to: its definition is the guards', and it sees what is wrong."""

import pytest

torch = pytest.importorskip("torch")

from benchmarks.gpu import kernels, problem  # noqa: E402
from benchmarks.gpu.clock import Clock  # noqa: E402
from benchmarks.guards import Pair, reference  # noqa: E402

CLOCK = Clock(dry=True)
CASES = {case.name: case for case in kernels.cases(dry=False)}


def test_its_definition_is_that_of_the_guards():
    config = kernels.flix.FlixConfig(registry=kernels.REGISTRY, ranks=2)
    layer = problem.flix_layer(torch.nn.Linear(5, 4), config, "gather")
    x, dy = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
    ids = torch.tensor([[0, 4], [1, 5], [0, -1]])
    pairs = problem.pairs_of(layer, config)
    found = problem.dense(x, dy, layer.weight, layer.bias, pairs, config, ids)
    features = kernels.REGISTRY.features
    expected = reference(
        x.numpy(),
        dy.numpy(),
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy(),
        {f: Pair(*(pairs[f"{s} {f}"].detach().numpy() for s in "AB")) for f in features},
        [[features[i] for i in row if i >= 0] for row in ids.tolist()],
    )
    names = {"y": "y", "dx": "x"} | {n: n[1:] for n in expected if n[:2] in ("dA", "dB")}
    assert set(names.values()) | {"weights"} == set(found)
    for theirs, ours in names.items():
        assert torch.allclose(found[ours], torch.from_numpy(expected[theirs]), atol=1e-12)


@pytest.mark.parametrize("name", list(CASES))
def test_gather_passes_every_case(name):
    """On the CPU, where the fused kernels do not run; they go through the same cases in the dry run and on a card."""
    case = CASES[name]
    far = kernels.errors(case, CLOCK, "gather")
    assert max(far.values()) <= kernels.TOLERANCE[case.autocast or case.dtype]


@pytest.mark.parametrize("part", ["y", "x", "weights", "A", "B"])
def test_whatever_is_wrong_is_seen(monkeypatch, part):
    case, plain = CASES["shape 4x5x24, float32"], kernels.step

    def wrong(*args):
        found = plain(*args)
        name = next(n for n in found if n == part or n.startswith(f"{part} "))
        return {**found, name: found[name] * 1.001}

    monkeypatch.setattr(kernels, "step", wrong)
    monkeypatch.setattr(kernels, "layer_of", _gathering(kernels.layer_of))
    with pytest.raises(AssertionError, match="is off by"):
        kernels.check(case, CLOCK)


def test_a_missing_and_a_superfluous_gradient_are_seen(monkeypatch):
    case, plain = CASES["shape 4x5x24, float32"], kernels.step
    monkeypatch.setattr(kernels, "layer_of", _gathering(kernels.layer_of))
    assert kernels.check(case, CLOCK) < 1e-5
    some = "A ('task', 'ner')"
    monkeypatch.setattr(
        kernels, "step", lambda *a: {n: v for n, v in plain(*a).items() if n != some}
    )
    with pytest.raises(AssertionError, match="is off by inf"):
        kernels.check(case, CLOCK)
    more = {"A ('language', 'zul')": torch.zeros(2, 24)}
    monkeypatch.setattr(kernels, "step", lambda *a: {**plain(*a), **more})
    with pytest.raises(AssertionError, match="is off by inf"):
        kernels.check(case, CLOCK)


def _gathering(layer_of):
    """Layers by gather in the place of fused ones, which a CPU cannot run."""
    return lambda case, strategy, device: layer_of(case, "gather", device)
