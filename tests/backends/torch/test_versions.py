"""Models of a transformers older than what the tests ran with are refused."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from packaging.requirements import Requirement
from transformers import BertConfig, BertModel

import flix
from flix.backends.torch import adapt, load, save
from flix.backends.torch.versions import TRANSFORMERS
from flix.core.errors import MissingFrameworkError

INSTALLED = sys.modules["transformers"]  # not what `import transformers` gives: it replaces itself
CONFIG = flix.FlixConfig(
    registry=flix.FeatureRegistry({"language": ["hau", "swa"]}), ranks=flix.ranks.uniform(2)
)


def model() -> BertModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, num_hidden_layers=1, vocab_size=20))


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.2.1rc1", "5.2.0.dev0"])
def test_models_of_an_older_transformers_are_refused(monkeypatch, version, tmp_path):
    save(adapt(model(), CONFIG), tmp_path)
    monkeypatch.setattr(INSTALLED, "__version__", version)
    for refused in (lambda: adapt(model(), CONFIG), lambda: load(model(), tmp_path)):
        with pytest.raises(MissingFrameworkError) as caught:
            refused()
        said = str(caught.value)
        assert f"BertModel is a model of transformers {version}" in said
        assert "pip install 'transformers>=5.3'" in said
    # A wrapper of such a model is no way round it.
    with pytest.raises(MissingFrameworkError, match="Sequential is a model"):
        adapt(torch.nn.Sequential(model()), CONFIG)


def test_a_refused_model_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(INSTALLED, "__version__", "4.57.6")
    base = model()
    before = {name: (type(module), id(module)) for name, module in base.named_modules()}
    with pytest.raises(MissingFrameworkError):
        adapt(base, CONFIG)
    assert {name: (type(m), id(m)) for name, m in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("version", ["5.3.0", "5.10.2", "6.0.0", "5.3.0.dev0", "unknown"])
def test_later_releases_are_adapted(monkeypatch, version):
    monkeypatch.setattr(INSTALLED, "__version__", version)
    adapt(model(), CONFIG)


def test_other_models_need_no_transformers(monkeypatch):
    monkeypatch.setattr(INSTALLED, "__version__", "4.57.6")
    adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), CONFIG)


def test_the_oldest_is_the_one_that_is_declared():
    project = Path(__file__).parents[3] / "pyproject.toml"
    extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    declared = {
        str(requirement.specifier)
        for extra in extras.values()
        for requirement in map(Requirement, extra)
        if requirement.name == "transformers"
    }
    assert declared == {f">={'.'.join(map(str, TRANSFORMERS))}"}
