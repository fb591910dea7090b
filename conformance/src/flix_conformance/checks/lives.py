"""What verbs take, return and leave: a model lives through all of them, and is counted on the way.

Each rule is checked on every backend alone, and once more between backends, so that they cannot drift apart.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flix.backends.verbs import Verbs
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import check
from flix_conformance.checks.conduct import FIRST, SECOND, two_layers
from flix_conformance.checks.files import pack
from flix_conformance.harness import Stack
from flix_conformance.strategies import Draw
from flix_conformance.table import Feature, written

_HAU, _NER, _POS = ("language", "hau"), ("task", "ner"), ("task", "pos")


@dataclass(frozen=True)
class Step:
    """What a model lives through.

    Attributes:
        verb, arguments, options: a call of a verb.
        sizes: the features that there are afterwards, with the number of their values.
        frozen: those of them that train no more.
    """

    verb: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    sizes: dict[Feature, int]
    frozen: set[Feature]


def _write_lora(folder: Path, draw: Draw) -> None:
    """A LoRA of rank 2 for the first layer, as PEFT writes it."""
    rng, stem = draw.generator(), f"base_model.model.{FIRST}.lora_"
    tensors = {"A.weight": rng.normal(size=(2, 4)), "B.weight": rng.normal(size=(4, 2))}
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [FIRST]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    named = {stem + name: tensor for name, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(pack(named))


def _steps(stack: Stack, rank: int, folder: Path) -> Iterator[Step]:
    """Every verb that changes a model, on features of two layers of 4 to 4: a rank has 16 values."""
    sizes: dict[Feature, int] = {f: 16 * len(a) for f, (a, _) in stack.pairs[FIRST].items()}
    new, renamed, lora, news, last = (
        *(("task", "joined: 新"), ("task", "renamed"), ("lora", "first"), ("domain", "news")),
        ("task", "last"),
    )
    yield Step("freeze", ([_NER, _HAU],), {}, sizes, {_NER, _HAU})
    yield Step("thaw", ({"language": "hau"},), {}, sizes, {_NER})
    sizes = {**sizes, new: 16 * rank}
    yield Step("add_feature", (*new, rank), {"freeze_others": False}, sizes, {_NER})
    sizes = {(renamed if f == _NER else f): size for f, size in sizes.items()}
    yield Step("rename_feature", (*_NER, "renamed"), {}, sizes, {renamed})
    sizes = {f: size for f, size in sizes.items() if f != _HAU}
    yield Step("remove_feature", _HAU, {}, sizes, {renamed})
    yield Step("load", (folder / "own",), {}, sizes, {renamed})
    sizes = {**sizes, news: 32}
    yield Step("load_features", (folder / "others",), {}, sizes, {renamed})
    sizes = {**sizes, lora: 16}
    yield Step("import_peft", ({"first": folder / "lora"}, "lora"), {}, sizes, {renamed})
    frozen, sizes = set(sizes), {**sizes, last: sizes[_POS]}
    yield Step("add_feature", last, {"init_from": "pos"}, sizes, frozen)
    yield Step("thaw", (), {}, sizes, set())


def _lived(draw: Draw, *backends: Backend) -> Iterator[tuple[Step, list[tuple[Any, Any, Any]]]]:
    """The same life of a model in each backend: after each step, what each had, as a snapshot too, and what it got."""
    rank = draw.one_of([1, 3])
    stack, other = (
        two_layers(draw),
        two_layers(draw, features={"domain": ["news"]}, ranks=2, alpha=1.0),
    )
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / backend.name for backend in backends]
        models = [backend.stacked(stack) for backend in backends]
        for backend, folder in zip(backends, folders, strict=True):
            folder.mkdir()
            backend.verb("save")(backend.stacked(other), folder / "others")
        _write_lora(Path(name) / "lora", draw)
        for folder in folders:
            (folder / "lora").symlink_to(Path(name) / "lora")
        for steps in zip(*(_steps(stack, rank, folder) for folder in folders), strict=True):
            met = []
            for i, (backend, step) in enumerate(zip(backends, steps, strict=True)):
                had, verb = models[i], backend.verb(step.verb)
                if step.verb == "load":
                    backend.verb("save")(had, *step.arguments)
                    had = backend.primitives.write(had, _zeroed(backend, had))
                before = _snapshot(backend, had)
                models[i] = verb(had, *step.arguments, **step.options)
                met.append((had, before, models[i]))
            yield steps[0], met


def _zeroed(backend: Backend, model: Any) -> Any:
    return {
        path: {feature: (0 * a, 0 * b) for feature, (a, b) in pairs.items()}
        for path, pairs in backend.primitives.read(model).items()
    }


def _snapshot(backend: Backend, model: Any) -> tuple[Any, set[Feature], dict[str, bytes]]:
    """A model's configuration, its frozen features, and its values."""
    config = backend.primitives.adapted(model).to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # layers as they come in the model
    values = {
        f"{path}, {part} of {written(feature)}": np.array(value).tobytes()
        for path, pairs in backend.primitives.read(model).items()
        for feature, pair in pairs.items()
        for part, value in zip("AB", pair, strict=True)
    }
    return config, set(backend.primitives.frozen(model)), values


@check(
    "a verb that changes a model returns it: the same object, or a new one, and then the old one is as it was",
    examples=2,
    uses=("files", "changes"),
)
def returned(draw: Draw, backend: Backend) -> None:
    for step, [(had, before, got)] in _lived(draw, backend):
        config = backend.primitives.adapted(got)
        assert config is not None, f"{step.verb} returned {type(got).__name__}, no adapted model"
        live = set(config.registry.live)
        assert live == set(step.sizes), f"{step.verb} returned a model with {sorted(live)}"
        frozen = set(backend.primitives.frozen(got))
        assert frozen == step.frozen, f"after {step.verb}, frozen are {sorted(frozen)}"
        assert got is had or _snapshot(backend, had) == before, (
            f"{step.verb} returned another object than the model that it changed"
        )


@check(
    "two backends have the same features and values after the same life",
    examples=2,
    pair=True,
    uses=("files", "changes"),
)
def cross_life(draw: Draw, first: Backend, second: Backend) -> None:
    for step, [(*_, mine), (*_, theirs)] in _lived(draw, first, second):
        one, other = _snapshot(first, mine), _snapshot(second, theirs)
        for what, a, b in zip(("configuration", "frozen features"), one, other, strict=False):
            assert a == b, f"after {step.verb} the {what} differ: {a} and {b}"
        assert one[2].keys() == other[2].keys(), f"after {step.verb} other values are there"
        # What starts from others comes of a decomposition of float32 values that are the same.
        for name, value in one[2].items():
            assert value == other[2][name], f"after {step.verb} the values of {name} differ"


# Counting.


def _base_size(stack_layers: int = 3) -> int:
    """The values of three layers of 4 to 4, of which the second has a bias."""
    return stack_layers * 16 + 4


def _counted(backend: Backend, model: Any) -> dict[str, Any]:
    found = backend.verb("summary")(model)
    return {
        "layers": set(found.layers),
        "features": dict(found.features),
        "ranks": set(found.ranks),
        "total": found.total,
        "trainable": found.trainable,
    }


@check(
    "summary counts the base and the features that there are; removed ones nowhere, frozen ones and heads in the total alone",
    examples=2,
    uses=("files", "changes"),
)
def counts(draw: Draw, backend: Backend) -> None:
    for step, [(*_, model)] in _lived(draw, backend):
        expected = {
            "layers": {FIRST, SECOND},
            "features": step.sizes,
            "ranks": set(step.sizes),
            "total": _base_size() + sum(step.sizes.values()),
            "trainable": sum(n for f, n in step.sizes.items() if f not in step.frozen),
        }
        for name, found in _counted(backend, model).items():
            assert found == expected[name], (
                f"after {step.verb}, {name} is {found}, expected {expected[name]}"
            )


@check(
    "a head that was unfrozen counts among what trains; the features count as before",
    examples=1,
    needs=("unfreeze",),
)
def trained_heads(draw: Draw, backend: Backend) -> None:
    model = backend.stacked(two_layers(draw))
    before = _counted(backend, model)
    backend.harness.unfreeze(model, "lm_head")
    expected = {**before, "trainable": before["trainable"] + 16}
    assert _counted(backend, model) == expected, f"{_counted(backend, model)}, not {expected}"


@check(
    "two backends count the same after the same life",
    examples=1,
    pair=True,
    uses=("files", "changes"),
)
def cross_counts(draw: Draw, first: Backend, second: Backend) -> None:
    for step, [(*_, mine), (*_, theirs)] in _lived(draw, first, second):
        one, other = _counted(first, mine), _counted(second, theirs)
        assert one == other, f"after {step.verb}: {one} and {other}"


# Names.

VERBS = (
    "adapt", "save", "load", "load_into", "to_adapter", "named_pairs", "add_feature", "remove_feature", "rename_feature",
    "load_features", "import_peft", "freeze", "thaw", "disable", "merge", "trainable_parameters", "summary",
)  # fmt: skip
OPTIONAL = ("merge_in_place", "unmerge", "export_peft")


def _signature(function: Any) -> list[str]:
    """Parameters as text, without annotations."""
    found = inspect.signature(function).parameters.values()
    return [str(p.replace(annotation=inspect.Parameter.empty)) + f" ({p.kind.name})" for p in found]


@check(
    "a backend's module has every verb, with the arguments and defaults of the one definition",
    examples=1,
)
def verbs(draw: Draw, backend: Backend) -> None:
    del draw
    missing = [name for name in VERBS if not callable(getattr(backend.module, name, None))]
    assert not missing, f"{backend.name} lacks the verbs {', '.join(missing)}"
    for name in (*VERBS, *OPTIONAL):
        if (own := getattr(backend.module, name, None)) is not None:
            expected = _signature(getattr(Verbs(backend.primitives), name))
            assert _signature(own) == expected, f"{name} takes {_signature(own)}, not {expected}"


@check("the verbs of two backends take the same arguments", examples=1, pair=True)
def cross_verbs(draw: Draw, first: Backend, second: Backend) -> None:
    del draw
    for name in (*VERBS, *OPTIONAL):
        mine, theirs = (getattr(backend.module, name, None) for backend in (first, second))
        if mine is not None and theirs is not None:
            assert _signature(mine) == _signature(theirs), (
                f"{name} takes {_signature(mine)} in {first.name}, {_signature(theirs)} in {second.name}"
            )
