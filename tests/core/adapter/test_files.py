"""Adapter files: round trip, checks, atomic writing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig, load_adapter, save_adapter
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.files import read_description

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["n.e.r", "ñ ü"]})
LAYERS = {"a.q": LayerShape(5, 3), "emb": LayerShape(7, 4, "embedding")}


def adapter(dtype=np.float32, **changes) -> Adapter:
    settings = {"ranks": {"language": {"hau": 2, "swa": 0}, "task": 3}, **changes}
    config = FlixConfig(registry=REGISTRY, **settings)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(dtype) for n, s in expected_tensors(config, LAYERS)}
    return Adapter(config, LAYERS, tensors)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_round_trip(tmp_path, dtype):
    original = adapter(dtype, rank_pattern={"q": {"task": 1}}, alpha=2.0)
    save_adapter(original, tmp_path / "x" / "y")
    assert sorted(p.name for p in (tmp_path / "x" / "y").iterdir()) == ["flix.safetensors", "flix_config.json"]  # fmt: skip
    again = load_adapter(tmp_path / "x" / "y")
    assert again.config == original.config and dict(again.layers) == LAYERS
    assert again.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)
    a, b = again.pair("a.q", ("language", "swa"))
    assert a.shape == (0, 5) and b.shape == (3, 0)
    assert "a.q.A.task.n.e.r" in again.tensors


def test_equal_adapters_are_equal_bytes(tmp_path):
    for number in range(4):
        save_adapter(adapter(), tmp_path / str(number))
    for name in ("flix.safetensors", "flix_config.json"):
        assert len({(tmp_path / str(n) / name).read_bytes() for n in range(4)}) == 1


def test_saving_over_an_adapter_replaces_it_and_leaves_other_files(tmp_path):
    save_adapter(adapter(), tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"mine")
    second = adapter(alpha=5.0)
    save_adapter(second, tmp_path)
    assert load_adapter(tmp_path).config.alpha == 5.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flix.safetensors", "flix_config.json", "optimizer.pt"]  # fmt: skip


def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    save_adapter(adapter(), tmp_path)
    before = load_adapter(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapter(alpha=5.0), tmp_path)
    monkeypatch.undo()
    after = load_adapter(tmp_path)
    assert after.config == before.config and len(list(tmp_path.iterdir())) == 2


def _tamper(folder, change):
    path = folder / "flix_config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_damage_is_found_and_named(tmp_path):
    folder = tmp_path / "adapter"

    def fresh():
        save_adapter(adapter(), folder)
        return folder / "flix.safetensors", folder / "flix_config.json"

    with pytest.raises(AdapterError, match=r"not an adapter: it has no flix_config\.json"):
        load_adapter(tmp_path / "nowhere")
    tensors, config = fresh()
    data = tensors.read_bytes()
    for cut in (0, 5, 100, len(data) - 3):
        tensors.write_bytes(data[:cut])
        with pytest.raises(AdapterError, match=r"flix\.safetensors.*(damaged|lacks)"):
            load_adapter(folder)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    tensors.write_bytes(bytes(flipped))
    with pytest.raises(AdapterError, match="was altered: its SHA-256"):
        load_adapter(folder)
    tensors.unlink()
    with pytest.raises(AdapterError, match=r"not a complete adapter: it has no flix\.safetensors"):
        load_adapter(folder)
    tensors, config = fresh()
    config.write_text(config.read_text()[:-20])
    with pytest.raises(AdapterError, match=r"flix_config\.json.*damaged"):
        load_adapter(folder)
    for change, message in [
        (lambda d: d.update(version=9), "format version 9; this flix reads version 1"),
        (lambda d: d.update(format="peft"), "does not describe a flix adapter"),
        (lambda d: d["config"].update(scaling="log"), "scaling must be"),
        (lambda d: d["config"]["ranks"]["task"].update({"ñ ü": 5}), r"'a.q.A.task.ñ ü' must have the shape \[5, 5\], got \[3, 5\]"),
        (lambda d: d["config"]["ranks"]["language"].update(swa=1), r"lacks the tensor 'a.q.A.language.swa'"),
        (lambda d: d["config"]["ranks"]["language"].update(hau=0), r"do not belong to it: .*language\.hau"),
        (lambda d: d["layers"].pop("emb"), r"do not belong to it: emb\."),
        (lambda d: d["layers"]["emb"].update(kind="conv"), "describes the layer 'emb' wrongly"),
        (lambda d: d["layers"]["emb"].update(d_in=8), r"'emb.A.language.hau' must have the shape \[2, 8\]"),
        (lambda d: d.pop("config"), "damaged or was altered"),
    ]:  # fmt: skip
        fresh()
        _tamper(folder, change)
        with pytest.raises(AdapterError, match=message):
            load_adapter(folder)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(AdapterError, match="saved as a folder, but"):
        save_adapter(adapter(), tmp_path / "x")


def test_descriptions_are_read_without_tensors(tmp_path):
    save_adapter(adapter(), tmp_path)
    (tmp_path / "flix.safetensors").unlink()
    wanted = (adapter().config, dict(adapter().layers))
    for path in (tmp_path, str(tmp_path / "flix_config.json")):
        config, layers = read_description(path)
        assert (config.to_dict(), layers) == (wanted[0].to_dict(), wanted[1])
    with pytest.raises(AdapterError, match=r"plan\.json' does not exist"):
        read_description(tmp_path / "plan.json")
