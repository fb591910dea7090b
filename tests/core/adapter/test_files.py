"""Adapter files: round trip, checks, atomic writing."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig, load_adapter, save_adapter
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.described import Base, Head
from flix.core.adapter.files import read_description
from flix.core.adapter.stored import StoredTensors
from flix.core.adapter.stream import write_tensors
from tests.helpers.beside import writing
from tests.helpers.stops import leftovers, stops

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["n.e.r", "ñ ü"]})
LAYERS = {"a.q": LayerShape(5, 3), "emb": LayerShape(7, 4, "embedding")}


HEADS = {
    "head.weight": Head("F32", np.arange(6, dtype="f4").reshape(2, 3)),
    "head.bias": Head("BF16", np.array([0x3F80, 0xC000], "u2")),
    "scale": Head("F16", np.float16(0.5).reshape(())),
}
BASE = Base("org/base", "abc123", "0123456789abcdef-fedcba9876543210")


def adapter(dtype=np.float32, heads=None, base=None, seed=0, **changes) -> Adapter:
    settings = {"ranks": {"language": {"hau": 2, "swa": 0}, "task": 3}, **changes}
    config = FlixConfig(registry=REGISTRY, **settings)
    rng = np.random.default_rng(seed)
    tensors = {n: rng.normal(size=s).astype(dtype) for n, s in expected_tensors(config, LAYERS)}
    return Adapter(config, LAYERS, tensors, heads or {}, base)


def same(found: Adapter, wanted: Adapter) -> None:
    assert found.config == wanted.config and dict(found.layers) == dict(wanted.layers)
    assert found.base == wanted.base and found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)
    assert found.heads.keys() == wanted.heads.keys()
    for name, head in wanted.heads.items():
        assert (found.heads[name].dtype, found.heads[name].shape) == (head.dtype, head.shape)
        np.testing.assert_array_equal(found.heads[name].values, head.values)


def text_of(folder) -> dict[str, str]:
    with safe_open(folder / "flix.safetensors", framework="numpy") as file:
        return file.metadata()


def rewritten(folder, change=None, *, tensors=None) -> None:
    """The folder's file with another description or other tensors, and its digest set right."""
    data = text_of(folder)
    parts = {
        k: json.loads(v) for k, v in data.items() if k in ("config", "layers", "heads", "base")
    }
    said = {"format": data["format"], "version": data["version"], **parts}
    if change is not None:
        change(said)
    metadata = {k: v if k in ("format", "version") else json.dumps(v) for k, v in said.items()}
    with open(folder / "flix.safetensors", "rb", buffering=0) as file:
        stored = StoredTensors(file)
        held = {name: stored[name] for name in stored}
    pairs = {n: t for n, t in held.items() if not n.startswith("trained.")}
    heads = {n: Head(stored.dtypes[n], t) for n, t in held.items() if n not in pairs}
    pairs = (
        pairs
        if tensors is None
        else {n: t for n, t in {**pairs, **tensors}.items() if t is not None}
    )
    with open(folder / "flix.safetensors", "wb", buffering=0) as file:
        write_tensors(file, list(pairs.items()), metadata, heads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_round_trip(tmp_path, dtype):
    original = adapter(dtype, HEADS, BASE, rank_pattern={"q": {"task": 1}}, alpha=2.0)
    save_adapter(original, tmp_path / "x" / "y")
    assert sorted(p.name for p in (tmp_path / "x" / "y").iterdir()) == ["flix.safetensors", "flix_config.json"]  # fmt: skip
    again = load_adapter(tmp_path / "x" / "y")
    same(again, original)
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


def test_the_one_file_holds_everything(tmp_path):
    save_adapter(adapter(heads=HEADS, base=BASE), tmp_path)
    with safe_open(tmp_path / "flix.safetensors", framework="numpy") as file:
        names = set(file.keys())
        dtypes = {n: file.get_slice(f"trained.{n}").get_dtype() for n in HEADS}
    assert names == {*adapter().tensors, *(f"trained.{name}" for name in HEADS)}
    assert dtypes == {name: head.dtype for name, head in HEADS.items()}
    said = text_of(tmp_path)
    assert said.keys() == {"format", "version", "config", "layers", "heads", "base", "digest"}
    assert (said["format"], said["version"], len(said["digest"])) == ("flix", "2", 64)
    copy = json.loads((tmp_path / "flix_config.json").read_text())
    assert copy.pop("sha256") == said["digest"] and copy.pop("version") == 2
    assert copy == {k: json.loads(said[k]) if k != "format" else "flix" for k in copy}
    assert copy["base"] == {"name": BASE.name, "revision": BASE.revision, "fingerprint": BASE.fingerprint}  # fmt: skip
    for text in (None, "", "{}", '{"format": "flix", "version": 1}'):
        (tmp_path / "flix_config.json").unlink()
        if text is not None:
            (tmp_path / "flix_config.json").write_text(text)
        same(load_adapter(tmp_path), adapter(heads=HEADS, base=BASE))
        if text is None:
            (tmp_path / "flix_config.json").write_text("")


@pytest.mark.parametrize("tidy", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_a_save_that_is_stopped_anywhere_leaves_one_version(tmp_path, version, tidy):
    old = adapter(seed=1, heads=HEADS)
    new = adapter(
        seed=2, heads={"scale": HEADS["scale"]}, ranks=2, alpha=3.0
    )  # described otherwise

    def start():
        for path in tmp_path.iterdir():
            path.unlink()
        (save_version_1 if version == 1 else save_adapter)(old, tmp_path)

    start()
    seen = []
    for stopped in stops(lambda: save_adapter(new, tmp_path), tidy):
        found = load_adapter(tmp_path)
        is_new = len(found.heads) == 1
        same(found, new if is_new else old)
        seen.append((stopped, is_new))
        assert len(leftovers(tmp_path)) <= (0 if tidy else 1)
        if stopped is not None:
            start()
    assert {is_new for at, is_new in seen if at} == {True, False} and seen[-1] == (None, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flix.safetensors", "flix_config.json"]


def save_version_1(adapter: Adapter, folder) -> None:
    """As flix before format 2 wrote it, by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(adapter.tensors), folder / "flix.safetensors", metadata={"format": "flix"})
    data = {"format": "flix", "version": 1, "config": adapter.config.to_dict(), "layers": {}}
    for path, shape in adapter.layers.items():
        data["layers"][path] = {"kind": shape.kind, "d_in": shape.d_in, "d_out": shape.d_out}
    digest = hashlib.sha256((folder / "flix.safetensors").read_bytes()).hexdigest()
    (folder / "flix_config.json").write_text(json.dumps({**data, "sha256": digest}))
    if adapter.heads:
        with open(folder / "trained.safetensors", "wb", buffering=0) as file:
            write_tensors(file, [], {"format": "pt"}, adapter.heads)


def test_version_1_is_read_and_becomes_version_2(tmp_path):
    for heads in ({}, HEADS):
        old = adapter(heads=heads)
        save_version_1(old, tmp_path)
        same(load_adapter(tmp_path), old)
        assert read_description(tmp_path)[0] == old.config
        save_adapter(load_adapter(tmp_path), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["flix.safetensors", "flix_config.json"]  # fmt: skip
        same(load_adapter(tmp_path), old)


def test_damage_to_version_1_is_found_and_named(tmp_path):
    def change_description(change):
        data = json.loads((tmp_path / "flix_config.json").read_text())
        change(data)
        (tmp_path / "flix_config.json").write_text(json.dumps(data))

    def cut(name, by=3):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-by])

    for damage, message in [
        (lambda: (tmp_path / "flix_config.json").unlink(), r"not an adapter: it has no flix_config\.json"),
        (lambda: (tmp_path / "flix.safetensors").unlink(), r"not a complete adapter: it has no flix\.safetensors"),
        (lambda: cut("flix_config.json", 20), r"flix_config\.json.*damaged"),
        (lambda: cut("flix.safetensors"), r"flix\.safetensors.*damaged"),
        (lambda: cut("trained.safetensors"), r"trained\.safetensors.*damaged"),
        (lambda: change_description(lambda d: d.update(sha256="0" * 64)), "the two files must come from one save"),
        (lambda: change_description(lambda d: d.update(version=9)), "format version 9; this flix reads versions 1 and 2"),
        (lambda: change_description(lambda d: d["layers"].pop("emb")), r"do not belong to it: emb\."),
        (lambda: save_file({"x": np.full(2, np.inf)}, tmp_path / "trained.safetensors"), "'x' holds values that are NaN"),
        (lambda: save_file({"x": np.zeros(2, "i4")}, tmp_path / "trained.safetensors"), "'x' must be one of"),
    ]:  # fmt: skip
        save_version_1(adapter(heads=HEADS), tmp_path)
        damage()
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path)


def test_damage_is_found_and_named(tmp_path):
    folder = tmp_path / "adapter"

    def fresh():
        save_adapter(adapter(heads=HEADS), folder)
        return folder / "flix.safetensors"

    with pytest.raises(AdapterError, match=r"not an adapter: it has no flix\.safetensors"):
        load_adapter(tmp_path / "nowhere")
    data = fresh().read_bytes()
    for cut in (0, 5, 100, len(data) - 3):
        (folder / "flix.safetensors").write_bytes(data[:cut])
        with pytest.raises(AdapterError, match=r"flix\.safetensors.*damaged"):
            load_adapter(folder)
    seed = data.index(b"seed") + 8  # in the metadata
    for place in (seed, len(data) - 1, data.index(b"digest") + 12):
        flipped = bytearray(data)
        flipped[place] ^= 1
        (folder / "flix.safetensors").write_bytes(bytes(flipped))
        with pytest.raises(AdapterError, match="was altered: its SHA-256"):
            load_adapter(folder)
    fresh().unlink()
    with pytest.raises(AdapterError, match=r"not a complete adapter: it has no flix\.safetensors"):
        load_adapter(folder)
    fresh().unlink()
    os.mkfifo(folder / "flix.safetensors")  # reading it would wait for ever
    with pytest.raises(AdapterError, match=r"it has no flix\.safetensors"):
        load_adapter(folder)
    (folder / "flix.safetensors").unlink()
    for change, message in [
        (lambda d: d.update(version="9"), "format version 9; this flix reads versions 1 and 2"),
        (lambda d: d.update(version="1"), "format version 1; "),
        (lambda d: d["config"].update(scaling="log"), "scaling must be"),
        (lambda d: d["config"]["ranks"]["task"].update({"ñ ü": 5}), r"'a.q.A.task.ñ ü' must have the shape \[5, 5\], got \[3, 5\]"),
        (lambda d: d["config"]["ranks"]["language"].update(swa=1), r"lacks the tensor 'a.q.A.language.swa'"),
        (lambda d: d["config"]["ranks"]["language"].update(hau=0), r"do not belong to it: .*language\.hau"),
        (lambda d: d["layers"].pop("emb"), r"do not belong to it: emb\."),
        (lambda d: d["layers"]["emb"].update(kind="conv"), "describes the layer 'emb' wrongly"),
        (lambda d: d["layers"]["emb"].update(d_in=8), r"'emb.A.language.hau' must have the shape \[2, 8\]"),
        (lambda d: d["layers"]["emb"].update(d_in=True), "describes the layer 'emb' wrongly"),
        (lambda d: d.pop("config"), "damaged or was altered"),
        (lambda d: d.update(heads=["scale"]), r"do not belong to it: trained\.head"),
        (lambda d: d.update(heads=[*HEADS, "x"]), r"lacks the tensor 'trained\.x'"),
        (lambda d: d.update(heads=[*HEADS, "scale"]), "names a head twice"),
        (lambda d: d.update(heads="scale"), "not a list of names"),
        (lambda d: d.update(base={"name": 7}), "something other than texts"),
        (lambda d: d.update(base=[]), "damaged or was altered"),
    ]:  # fmt: skip
        fresh()
        rewritten(folder, change)
        with pytest.raises(AdapterError, match=message):
            load_adapter(folder)
    for name, value, message in [
        ("emb.A.language.hau", None, "lacks the tensor 'emb.A.language.hau'"),
        ("emb.A.language.hau", np.zeros((2, 9)), r"must have the shape \[2, 7\]"),
        ("odd", np.zeros(2), "do not belong to it: odd"),
        ("emb.A.language.hau", np.full((2, 7), np.nan), r"'emb.A.language.hau' holds values that are NaN"),
    ]:  # fmt: skip
        fresh()
        rewritten(folder, tensors={name: value})
        with pytest.raises(AdapterError, match=message):
            load_adapter(folder)
    found = load_adapter(folder, finite=False)  # to look at what is broken
    assert np.isnan(found.pair("emb", ("language", "hau"))[0]).all()


def test_names_that_would_be_one_in_the_file_are_refused(tmp_path):
    registry = FeatureRegistry({"g": ["b.A.g.c", "c"]})
    config = FlixConfig(registry=registry, ranks={("g", "b.A.g.c"): 1, ("g", "c"): 1})
    layers = {"a": LayerShape(2, 2), "a.A.g.b": LayerShape(2, 2)}
    tensors = {name: np.zeros(shape, "f4") for name, shape in expected_tensors(config, layers)}
    with pytest.raises(AdapterError, match="the same name"):
        Adapter(config, layers, tensors)
    config = FlixConfig(registry=FeatureRegistry({"g": ["x"]}), ranks=1)
    layers = {"trained": LayerShape(2, 2)}
    tensors = {name: np.zeros(shape, "f4") for name, shape in expected_tensors(config, layers)}
    save_adapter(Adapter(config, layers, tensors), tmp_path)
    assert dict(load_adapter(tmp_path).layers) == layers
    head = {"A.g.x": Head("F32", np.zeros((1, 2), "f4"))}
    with pytest.raises(AdapterError, match="give a tensor the same name in the file"):
        save_adapter(Adapter(config, layers, tensors, head), tmp_path)


def test_a_reader_beside_two_writers_sees_whole_versions(tmp_path):
    versions = [adapter(seed=i, heads={"x": Head("F32", np.full(3, i, "f4"))}) for i in range(2)]
    save_adapter(versions[0], tmp_path)
    with writing(*(partial(save_adapter, version, tmp_path) for version in versions)):
        for _ in range(200):
            found = load_adapter(tmp_path)
            same(found, versions[int(found.heads["x"].values[0])])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flix.safetensors", "flix_config.json"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(AdapterError, match="saved as a folder, but"):
        save_adapter(adapter(), tmp_path / "x")
