"""Adapter files in part: descriptions without tensors, tensors while the file is open, names in other forms."""

from __future__ import annotations

import unicodedata

import pytest

from flix import (
    AdapterError,
    load_adapter,
    remove_feature,
    rename_feature,
    save_adapter,
    select_features,
)
from flix.core.adapter import files
from flix.core.adapter.described import Base
from flix.core.adapter.files import (
    read_description,
    save_new_adapter,
    save_pairs,
    stored_adapter,
)
from tests.core.adapter.test_files import BASE, HEADS, LAYERS, REGISTRY, adapter, rewritten, same


def test_descriptions_are_read_without_tensors(tmp_path):
    wanted = (adapter().config.to_dict(), dict(adapter().layers))

    def read(path):
        config, layers = read_description(path)
        return config.to_dict(), layers

    save_adapter(adapter(), tmp_path)
    (tmp_path / "flix_config.json").write_text("stale")
    for path in (tmp_path, str(tmp_path / "flix_config.json")):
        assert read(path) == wanted
    save_adapter(adapter(), tmp_path)
    (tmp_path / "flix.safetensors").unlink()
    (tmp_path / "flix_config.json").rename(tmp_path / "plan.json")
    assert read(tmp_path / "plan.json") == wanted
    with pytest.raises(AdapterError, match=r"is not an adapter: it has no flix_config\.json"):
        read(tmp_path)
    save_adapter(adapter(), tmp_path)
    rewritten(tmp_path, lambda said: said.update(version="9"))
    with pytest.raises(AdapterError, match="has format version 9; this flix reads versions 1 and"):
        read(tmp_path)
    with pytest.raises(AdapterError, match=r"no\.json' does not exist"):
        read_description(tmp_path / "no.json")


@pytest.mark.parametrize("data", [b"", b"1234", (99).to_bytes(8, "little") + b"{}"])
def test_the_copy_does_not_stand_in_for_a_damaged_file(tmp_path, data):
    save_adapter(adapter(), tmp_path)
    (tmp_path / "flix.safetensors").write_bytes(data)
    for path in (tmp_path, tmp_path / "flix_config.json"):
        with pytest.raises(AdapterError, match=r"flix\.safetensors' is damaged \(truncated or alt"):
            read_description(path)
    (tmp_path / "flix.safetensors").unlink()  # a description alone can be planned
    assert read_description(tmp_path)[0] == adapter().config


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    save_adapter(adapter(), tmp_path)
    (tmp_path / "flix_config.json").rename(tmp_path / "plan.json")
    monkeypatch.setattr(files, "open", denied, raising=False)
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    for read, name in (
        (load_adapter, "flix.safetensors"),
        (lambda path: read_description(path / "plan.json"), "plan.json"),
    ):
        with pytest.raises(AdapterError, match=rf"{name}' cannot be read: .*Permission denied"):
            read(tmp_path)


def test_pairs_alone_are_saved_as_an_adapter_is(tmp_path):
    whole = adapter(heads=HEADS, base=BASE)
    pairs = {path: {f: whole.pair(path, f) for f in REGISTRY.features} for path in LAYERS}
    save_pairs(whole.config, LAYERS, pairs, tmp_path / "x", HEADS, BASE)
    same(load_adapter(tmp_path / "x"), whole)
    with pytest.raises(AdapterError, match=r"layer 'emb' has no pair of language=hau"):
        save_pairs(whole.config, LAYERS, {**pairs, "emb": {}}, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_while_a_file_is_open_its_pairs_are_a_mapping_without_its_heads(tmp_path):
    whole = adapter(heads=HEADS)
    save_adapter(whole, tmp_path)
    with stored_adapter(tmp_path) as found:
        assert len(found.tensors) == len(whole.tensors) and set(found.tensors) == set(whole.tensors)
        for name in ("trained.scale", "nothing"):
            assert name not in found.tensors
            with pytest.raises(KeyError):
                found.tensors[name]


def test_names_that_the_file_has_in_another_unicode_form_are_found(tmp_path):
    save_adapter(adapter(), tmp_path)
    odd = {n: unicodedata.normalize("NFD", n) for n in adapter().tensors if "\xf1" in n}
    assert len(odd) == 4 and len(odd) < len(adapter().tensors)
    moved = {odd[n]: adapter().tensors[n] for n in odd}
    rewritten(tmp_path, tensors={**dict.fromkeys(odd), **moved})
    same(load_adapter(tmp_path), adapter())
    # Both forms of one name are no adapter's file.
    rewritten(tmp_path, tensors={n: adapter().tensors[n] for n in odd})
    with pytest.raises(AdapterError, match="has tensors that do not belong to it: "):
        load_adapter(tmp_path)


def test_the_recipe_of_another_adapter_does_not_stay(tmp_path):
    """A recipe says how an adapter is asked. It goes with its adapter, and stays where the same one is saved again."""
    recipe = tmp_path / "recipe.json"
    old = adapter(heads=HEADS, base=BASE)
    renamed = rename_feature(old, "language", "hau", "ha")
    far = Base("org/other", None, "f" * 16 + "-" + "e" * 16)
    swa = select_features(old, {"language": "swa"})
    for new, stays in [
        (adapter(heads=HEADS, base=BASE, seed=2), True),  # trained on
        (remove_feature(old, "language", "hau"), True),
        (adapter(heads=HEADS), True),  # nobody can tell what it was trained on
        (swa, False),
        (renamed, False),  # what the recipe calls seen has another name now
        (adapter(base=BASE), True),  # the recipe's heads are then found to be missing
        (adapter(heads=HEADS, base=far), False),
    ]:
        save_adapter(old, tmp_path)
        recipe.write_text("{}")
        save_adapter(new, tmp_path)
        assert recipe.exists() == stays
    recipe.write_text("{}")
    (tmp_path / "flix.safetensors").write_bytes(b"")
    save_adapter(old, tmp_path)
    assert not recipe.exists()
    (tmp_path / "flix.safetensors").unlink()
    (tmp_path / "flix_config.json").unlink()
    recipe.write_text("{}")
    save_adapter(old, tmp_path)  # copied there before the first save
    assert recipe.exists()


def test_a_recipe_stays_where_its_adapter_stays(tmp_path, monkeypatch):
    save_adapter(adapter(), tmp_path)
    (tmp_path / "recipe.json").write_text("{}")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        save_new_adapter(adapter(alpha=5.0), tmp_path)
    assert (tmp_path / "recipe.json").exists()
    monkeypatch.undo()
    save_new_adapter(adapter(alpha=5.0), tmp_path)
    assert not (tmp_path / "recipe.json").exists()
