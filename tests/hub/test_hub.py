"""Adapters of a hub: fetched by name, found in the cache without one, pushed with a card; and what a hub says no to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

import flix
from flix import hub
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.files import CONFIG_FILE, TENSOR_FILE, save_adapter
from tests.helpers.hub import Hub, running

REGISTRY = flix.FeatureRegistry(
    {"language": ["hau", "swa"], "task": ["ner"], "shared": ["all"]},
    implies={("task", "ner"): [("shared", "all")]},
)
CONFIG = flix.FlixConfig(registry=REGISTRY, ranks=2)


def adapter(seed: int = 0) -> Any:
    layers, rng = {"up": LayerShape(4, 6)}, np.random.default_rng(seed)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in expected_tensors(CONFIG, layers)
    }
    base = flix.core.adapter.described.Base("org/base", None, None)
    return flix.Adapter(CONFIG, layers, tensors, {}, base)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import huggingface_hub
    from huggingface_hub import constants

    with running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip

        class Api(huggingface_hub.HfApi):  # a class, as annotations elsewhere need one
            def __init__(self) -> None:
                super().__init__(found.address, token="a")

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        yield found


def pushed(server: Hub, tmp_path: Path, seed: int = 0, **more: Any) -> str:
    save_adapter(adapter(seed), tmp_path / "adapter")
    return hub.push(tmp_path / "adapter", "ann/hausa", **more)


def test_what_is_pushed_is_fetched(server: Hub, tmp_path: Path) -> None:
    url = pushed(server, tmp_path, message="Better")
    assert url.startswith(f"{server.address}/ann/hausa/commit/") and server.messages == ["Better"]
    assert set(server.files("ann/hausa")) == {TENSOR_FILE, CONFIG_FILE, "README.md"}
    found = flix.load_adapter(hub.fetch("ann/hausa"))
    for name, value in adapter().tensors.items():
        assert np.array_equal(found.tensors[name], value)


def test_the_recipe_of_another_adapter_does_not_stay_in_a_repository(server: Hub, tmp_path: Path) -> None:  # fmt: skip
    """As in a folder: ``predict`` would ask the new adapter as the old one."""
    save_adapter(adapter(), tmp_path / "adapter")
    recipe = tmp_path / "adapter" / "recipe.json"
    recipe.write_text("{}")
    hub.push(tmp_path / "adapter", "ann/hausa")
    server.files("ann/hausa")["trained.safetensors"] = b"of version 1"
    recipe.unlink()
    pushed(server, tmp_path, seed=1)  # trained on, and pushed from a program
    assert set(server.files("ann/hausa")) == {TENSOR_FILE, CONFIG_FILE, "README.md", "recipe.json"}
    other = flix.select_features(adapter(), {"language": "swa"})
    save_adapter(other, tmp_path / "other")
    server.files("ann/hausa")["notes.txt"] = b"mine"
    hub.push(tmp_path / "other", "ann/hausa")
    assert set(server.files("ann/hausa")) == {TENSOR_FILE, CONFIG_FILE, "README.md", "notes.txt"}


def test_revisions_are_kept_apart_and_a_version_is_whole(server: Hub, tmp_path: Path) -> None:
    first = pushed(server, tmp_path).rpartition("/")[2]
    pushed(server, tmp_path, seed=1)
    old, new = (flix.load_adapter(hub.fetch("ann/hausa", r)) for r in (first, None))
    name = next(iter(old.tensors))
    assert np.array_equal(old.tensors[name], adapter(0).tensors[name])
    assert np.array_equal(new.tensors[name], adapter(1).tensors[name])


def test_the_card_says_what_the_adapter_is_made_of(server: Hub, tmp_path: Path) -> None:
    cell = {"cell": "language=hau|x,task=ner", "seen": True, "rows": 5, "metric": "entity_f1"}
    cells = [{**cell, "score": 61.54, "interval": [50.0, 72.25]}, {**cell, "seen": False, "score": None, "interval": [None, None]}]  # fmt: skip
    run = {"cells": cells, "training": {"steps": 40}}
    pushed(server, tmp_path, run=run, private=True)
    text = server.files("ann/hausa")["README.md"].decode()
    _, header, body = text.split("---", 2)
    facts = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in header.strip().splitlines())}  # fmt: skip
    assert facts["base_model"] == "org/base" and facts["language"] == ["hau", "swa"]
    assert facts["library_name"] == "flix" and server.private["ann/hausa"]
    assert "| task=ner | 2 | 20 | shared=all |" in body
    assert "After 40 steps." in body
    assert r"| language=hau\|x,task=ner | yes | 5 | entity_f1 | 61.5 | 50.0 to 72.2 |" in body
    assert r"| language=hau\|x,task=ner | no | 5 | entity_f1 | - | - |" in body
    assert "model = load_pretrained('ann/hausa')  # on org/base" in body


@pytest.mark.parametrize(
    "name, revision, message",
    [
        ("ann/nothing", None, "no such repository, or it is private"),
        ("ann/hausa", "v9", "there is no revision 'v9'"),
    ],
)
def test_what_a_hub_does_not_have(server: Hub, tmp_path: Path, name, revision, message) -> None:
    pushed(server, tmp_path)
    with pytest.raises(flix.AdapterError, match=message):
        hub.fetch(name, revision)


def test_a_repository_without_an_adapter_is_named(server: Hub) -> None:
    server.repositories["ann/other"] = [{"model.safetensors": b"x"}]
    with pytest.raises(flix.AdapterError, match="holds no adapter of flix"):
        hub.fetch("ann/other")


def test_without_a_network_the_cache_answers(server: Hub, tmp_path: Path) -> None:
    pushed(server, tmp_path)
    folder = hub.fetch("ann/hausa")
    server.shutdown(), server.server_close()
    assert hub.fetch("ann/hausa") == folder
    with pytest.raises(
        flix.AdapterError, match="cannot be reached, and the cache does not have it"
    ):
        hub.fetch("ann/swahili")


def test_nothing_damaged_is_pushed(server: Hub, tmp_path: Path) -> None:
    save_adapter(adapter(), tmp_path / "adapter")
    file = tmp_path / "adapter" / TENSOR_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(flix.AdapterError, match="damaged"):
        hub.push(tmp_path / "adapter", "ann/hausa")
    assert not server.repositories
    with pytest.raises(flix.AdapterError, match="named org/name, got 'hausa'"):
        hub.push(tmp_path / "adapter", "hausa")


def test_folders_come_before_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("ann/hausa") and not hub.is_name(Path("ann/hausa"))
    for path in ("ann", "./ann/hausa", "a/b/c", "/ann/hausa", "ann/hau sa"):
        assert not hub.is_name(path)
        assert hub.place(path) == path
    os.mkdir("ann")
    assert not hub.is_name("ann/hausa")
    with pytest.raises(flix.AdapterError, match="revision= is for adapters of a hub"):
        hub.place("ann/hausa", "main")


def test_models_load_and_push_by_name(server: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from flix.backends.torch import adapt, load, load_features, push

    def net() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6))

    model = adapt(net(), CONFIG)
    with torch.no_grad():
        for parameter in model.flix_bank.parameters():
            parameter.normal_()
    first = push(model, "ann/net").rpartition("/")[2]
    x, ids = torch.ones(1, 4), REGISTRY.encode([{"language": "hau"}])
    wanted = model(x, flix_features=ids)
    with torch.no_grad():
        for parameter in model.flix_bank.parameters():
            parameter.zero_()
    push(model, "ann/net")
    assert torch.equal(load(net(), "ann/net", revision=first)(x, flix_features=ids), wanted)
    assert torch.equal(load(net(), "ann/net")(x, flix_features=ids), net()(x))
    taken = load_features(model, "ann/net", conflicts="keep")
    assert taken is model


def test_a_run_brings_its_base_and_heads(server: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from flix.backends.torch import adapt, save
    from flix.tasks import (
        load_base,
        load_pretrained,
        load_tokenizer,
        tasks_of,
        tokenizer_of,
        train_heads,
    )
    from tests.helpers.tasks import config_of, encoder, headed_tasks, shaken

    base = encoder(tmp_path / "base", "bert")
    tasks = headed_tasks(load_tokenizer(str(base)))
    model = train_heads(shaken(adapt(load_base(str(base), tasks), config_of())))
    save(model, tmp_path / "adapter")
    recipe = {"format": 1, "model": str(base), "tokenizer": None, "tasks": [t.described() for t in tasks]}  # fmt: skip
    (tmp_path / "adapter" / "recipe.json").write_text(json.dumps(recipe))
    first = hub.push(tmp_path / "adapter", "ann/heads").rpartition("/")[2]
    found = load_pretrained("ann/heads", revision=first)
    assert torch.equal(found.classifier["topic"].weight, model.classifier["topic"].weight)
    assert tasks_of("ann/heads", tokenizer_of("ann/heads")) == tasks


def test_without_huggingface_hub_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["huggingface_hub"] = None
from flix import hub, MissingFrameworkError
try:
    hub.fetch("ann/hausa")
except MissingFrameworkError as error:
    assert 'pip install "flix-peft[hub]"' in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
