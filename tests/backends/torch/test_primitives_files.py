"""Features that are added, and files of features."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import AdapterError, FeatureError, RankError  # noqa: E402
from flix.backends.torch import adapt, add_feature, load, save  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    adapted,
    batch,
    live_pairs,
    make,
    output,
    randomize,
    routing,
)


def test_add_feature_trains_alone_and_keeps_the_rest():
    model = adapted()
    ids, weights = routing()
    inputs = batch("llama")
    before_out = output(model(**inputs, flix_features=ids, flix_weights=weights))
    before = {n: p.detach().clone() for n, p in live_pairs(model).items()}
    add_feature(model, "language", "ibo", rank=3)
    same = output(model(**inputs, flix_features=ids, flix_weights=weights))
    assert_close(same, before_out)
    registry = model.flix_config.registry
    assert registry.id("language", "ibo") == 6 and registry.id("task", "ner") == 4
    model.train()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    new_ids = torch.from_numpy(registry.encode([{"language": "ibo", "task": "ner"}] * 4).ids)
    for _ in range(2):
        opt.zero_grad()
        output(model(**inputs, flix_features=new_ids)).sum().backward()
        opt.step()
    after = live_pairs(model)
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert all(after[n].any() for n in after if n.endswith(".ibo"))


@pytest.mark.parametrize("rank", [None, 2, 5])
def test_add_feature_from_another(rank):
    model = adapted()
    add_feature(model, "language", "kin", rank=rank, init_from="swa")
    for _, layer in flix_layers(model):
        swa = layer.flix_B[("language", "swa")] @ layer.flix_A[("language", "swa")]
        kin = layer.flix_B[("language", "kin")] @ layer.flix_A[("language", "kin")]
        if rank == 2:  # the best of rank 2, by the singular values that are left out
            lost = torch.linalg.svdvals(swa)[2:].norm()
            assert torch.linalg.norm(swa - kin).item() == pytest.approx(lost.item(), rel=1e-6)
        else:
            assert_close(kin, swa)


def test_add_feature_from_the_mean_of_several():
    model = adapted()
    add_feature(model, "language", "kin", rank=6, init_from=["hau", "swa", "yor"])
    for path, layer in flix_layers(model):
        mean = 0
        for name in ("hau", "swa"):  # yor has rank 0: it counts as zero
            scale = model.flix_config.scale(path, ("language", name))
            mean = mean + scale / 3 * (
                layer.flix_B[("language", name)] @ layer.flix_A[("language", name)]
            )
        kin = layer.flix_B[("language", "kin")] @ layer.flix_A[("language", "kin")]
        assert_close(kin, mean)


def test_add_feature_errors():
    model = adapted()
    with pytest.raises(FeatureError, match="occurs twice"):
        add_feature(model, "language", "swa", rank=2)
    with pytest.raises(FeatureError, match="no feature group 'lang'"):
        add_feature(model, "lang", "ibo", rank=2)
    with pytest.raises(RankError, match="needs a rank"):
        add_feature(model, "language", "ibo")


def test_load_into_another_architecture_names_the_layer(tmp_path):
    save(adapted(), tmp_path)
    with pytest.raises(AdapterError, match=r"another architecture.*no layer 'model\.layers\.0"):
        load(make("gpt2"), tmp_path)
    from tests.helpers.torch import llama

    wider = llama(intermediate_size=32).double()
    with pytest.raises(AdapterError, match=r"gate_proj' is linear 16 -> 24.*16 -> 32"):
        load(wider, tmp_path)
    assert not list(flix_layers(wider))


def test_rename_translates_layer_paths(tmp_path):
    source = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), config())
    randomize(source)
    save(source, tmp_path)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    for rename in ({"0": "a", "1": "b"}, lambda path: "ab"[int(path)]):
        net = load(Net(), tmp_path, rename=rename)
        values = live_pairs(net)
        for name, value in live_pairs(source).items():
            path, rest = name.split(".", 1)
            assert torch.equal(values[f"{'ab'[int(path)]}.{rest}"], value)


def test_a_file_reads_without_torch(tmp_path):
    model = adapted()
    save(model, tmp_path)
    adapter = flix.load_adapter(tmp_path)
    a, b = adapter.pair("model.layers.0.mlp.up_proj", ("task", "pos"))
    np.testing.assert_array_equal(a, live_pairs(model)["model.layers.0.mlp.up_proj.A.task.pos"].detach())  # fmt: skip
    assert a.shape == (4, 16) and b.shape == (24, 4)
