"""Files from strangers: each is refused, or read, within seconds and with memory in proportion to its size.

They are read in a process of their own, whose memory is limited, so that a file that does harm does none here.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flix
from flix import AdapterError
from flix.core.adapter.stream import write_tensors

HUGE = 10**400
DEEP = "[" * 100_000 + "]" * 100_000


def described(
    features: Any = (("g", "a"),), groups: Any = ("g",), layers: Any = None, **config: Any
) -> dict[str, Any]:
    registry = {"groups": list(groups), "features": [list(f) for f in features], "implies": []}
    return {
        "config": {"registry": registry, "ranks": 0, **config},
        "layers": {"q": {"kind": "linear", "d_in": 2, "d_out": 2}} if layers is None else layers,
        "heads": [],
        "base": None,
    }


def write(folder: Path, said: Any, tensors: Any = (), version: int = 2) -> None:
    """A description, given as JSON or as texts of its parts, as a folder of either version, its digest right."""
    if version == 1:
        whole = {"format": "flix", "version": 1, **said}
        raw = {k: v for k, v in whole.items() if isinstance(v, bytes)}
        text = json.dumps({k: f"<{k}>" if k in raw else v for k, v in whole.items()})
        for name, value in raw.items():
            text = text.replace(f'"<{name}>"', value.decode())
        (folder / "flix_config.json").write_text(text)
        metadata = {"format": "flix"}
    else:
        parts = {k: v.decode() if isinstance(v, bytes) else json.dumps(v) for k, v in said.items()}
        metadata = {"format": "flix", "version": "2", **parts}
    with open(folder / "flix.safetensors", "wb", buffering=0) as file:
        write_tensors(file, list(tensors), metadata)


def layer(path: str = "q", **changes: Any) -> dict[str, Any]:
    return {path: {"kind": "linear", "d_in": 2, "d_out": 2, **changes}}


def many_layers(count: int) -> dict[str, Any]:
    return {f"l{i}": {"kind": "linear", "d_in": 2, "d_out": 2} for i in range(count)}


def chain(count: int) -> dict[str, Any]:
    said = described([["g", f"f{i}"] for i in range(count)], layers={})
    links = [[["g", f"f{i}"], [["g", f"f{i + 1}"]]] for i in range(count - 1)]
    said["config"]["registry"]["implies"] = links
    return said


def stars(count: int) -> dict[str, Any]:
    names = [["g", f"f{i}"] for i in range(count)]
    said = described([*names, ["h", "x"], *(["k", f"f{i}"] for i in range(count))], "ghk", {})
    said["config"]["registry"]["implies"] = [[["g", "*"], [["k", f"f{i}"] for i in range(count)]]]
    return said


def removed(count: int) -> dict[str, Any]:
    names = [["g", str(i)] for i in range(count)]
    said = described(names, layers={})
    said["config"]["registry"]["removed"] = names[:-1]
    return said


def pattern(text: str, path: str = "a" * 40 + "!", rank: Any = 1) -> dict[str, Any]:
    return described(layers=layer(path), rank_pattern={text: rank})


NAMES = [["g", str(i)] for i in range(20_000)]
REFUSED: dict[str, Callable[[], Any]] = {
    "a description that nests": lambda: {**described(), "config": DEEP.encode()},
    "layers that nest": lambda: {**described(), "layers": DEEP.encode()},
    "an alpha of 400 digits": lambda: described(alpha=HUGE, ranks=1),
    "a rank of 400 digits": lambda: described(ranks=HUGE),
    "a size of 400 digits": lambda: described(layers=layer(d_in=HUGE)),
    "a number of 5,000 digits": lambda: {**described(), "config": b'{"seed": 1' + b"0" * 5000 + b"}"},
    "a rate of 400 digits": lambda: described(feature_dropout={"p": HUGE}),
    "NaN for alpha": lambda: {**described(), "config": json.dumps(described(alpha=float("nan"))["config"]).encode()},
    "a name twice": lambda: {**described(), "layers": b'{"q": {}, "q": {}}'},
    "a repeat in a repeat": lambda: pattern("(a+)+$"),
    "a repeat in a repeat of targets": lambda: described(target_modules="(a*)*b"),
    "a repeat in a repeat of exclusions": lambda: described(exclude_modules="((a|b)+)+"),
    "a pattern that nests": lambda: pattern("(" * 50_000 + ")" * 50_000),
    "a pattern that counts": lambda: pattern("((a{1,900}){1,900}){1,900}"),
    "a pattern that is none": lambda: pattern("(a"),
    "patterns without number": lambda: described(layers=many_layers(5000), rank_pattern={f"x.*{i}y": 1 for i in range(30_000)}),
    "patterns for very many layers": lambda: described(layers=many_layers(40_000), rank_pattern={f"x.*{i}y": 1 for i in range(1900)}),
    "alphas without number": lambda: described(layers=many_layers(5000), alpha_pattern={f"x.*{i}y": 1 for i in range(30_000)}),
    "patterns with very many ranks": lambda: described(NAMES, rank_pattern={f"x{i}": i for i in range(1900)}),
    "layers times features": lambda: described(NAMES, layers=many_layers(20_000), ranks=1),
    "heads without number": lambda: {**described(), "heads": [str(i) for i in range(50_000)]},
    "a cycle of implications": lambda: _cycle(30_000),
    "a layer of another kind": lambda: described(layers=layer(kind=["linear"])),
    "layers in a list": lambda: described(layers=[1, 2]),
    "a layer that is a number": lambda: described(layers={"q": 7}),
    "a base that is a list": lambda: {**described(), "base": [1]},
    "a base of numbers": lambda: {**described(), "base": {"name": HUGE}},
    "heads that are numbers": lambda: {**described(), "heads": [1]},
    "a configuration that is a list": lambda: {**described(), "config": [1]},
    "a registry that is a text": lambda: {**described(), "config": {"registry": "x", "ranks": 1}},
}  # fmt: skip
READ: dict[str, Callable[[], Any]] = {
    "a chain of implications": lambda: chain(30_000),
    "a star of implications": lambda: stars(10_000),
    "removed features": lambda: removed(30_000),
    "groups": lambda: described([[f"g{i}", "a"] for i in range(20_000)], [f"g{i}" for i in range(20_000)], {}),
    "layers times features of rank 0": lambda: described(NAMES, layers=many_layers(20_000)),
    "alternatives that are alike": lambda: pattern("(a|a|a)*b", "a" * 5000 + "!"),
    "stars in a row": lambda: pattern(".*.*.*.*.*.*.*.*x", "a" * 5000 + "!"),
    "optional letters": lambda: pattern("(a?){30}" + "a" * 30, "a" * 30 + "!"),
    "a path of a million letters": lambda: described(layers=layer("a" * 1_000_000)),
    "a pattern for each layer": lambda: described(layers=many_layers(3000), rank_pattern={f"^(?:l{i})": 0 for i in range(3000)}),
    "a seed of 400 digits": lambda: described(seed=HUGE),
    "unknown names without number": lambda: described(NAMES, layers={}, unknown={f"u{i}": str(i) for i in range(20_000)}),
}  # fmt: skip
# Version 1 has neither heads nor a base.
OF_BOTH = [name for name in (*REFUSED, *READ) if not name.startswith(("heads", "a base"))]


def _cycle(count: int) -> dict[str, Any]:
    said = chain(count)
    said["config"]["registry"]["implies"].append([["g", f"f{count - 1}"], [["g", "f0"]]])
    return said


def many_tensors(folder: Path) -> None:
    """Hundreds of thousands of names that look like the one that is missing."""
    write(folder, described(ranks=1), [(f"q.A.g.a{i}", np.zeros(1, "f4")) for i in range(200_000)])


def _read_all(folder: Path) -> None:
    """What the process of its own does: read each folder, and say what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))  # a file that never ends is stopped here
    found = {}
    for path in sorted(folder.iterdir()):
        began = time.process_time()
        try:
            flix.load_adapter(path)
            outcome = "read"
        except AdapterError as error:
            outcome = f"refused: {str(error)[:300]}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:300]}"
        found[path.name] = (outcome, time.process_time() - began)
    print(json.dumps([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


@pytest.fixture(scope="module")
def outcomes() -> Any:
    """What came of each file, by version and name; the most memory that the process took, in MiB."""
    with tempfile.TemporaryDirectory() as name:
        for kind, make in {**REFUSED, **READ}.items():
            for version in (1, 2):
                if version == 2 or kind in OF_BOTH:
                    folder = Path(name) / f"{version} {kind}"
                    folder.mkdir()
                    write(folder, make(), version=version)
        (folder := Path(name) / "2 tensors that look alike").mkdir()
        many_tensors(folder)
        command = [sys.executable, "-m", __name__, name]
        # Of the clock on the wall there is plenty: the machine may have other work.
        result = subprocess.run(command, capture_output=True, text=True, timeout=3000)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


def test_refused_ones_are_refused_and_the_others_read(outcomes: Any) -> None:
    found, _ = outcomes
    wrong = {
        kind: outcome
        for kind, (outcome, _) in found.items()
        if outcome.split(":")[0] != ("read" if kind[2:] in READ else "refused")
    }
    assert wrong == {} and len(found) > 60


@pytest.mark.timed
def test_each_takes_seconds_and_no_more_memory_than_its_size_explains(outcomes: Any) -> None:
    found, mebibytes = outcomes
    slow = {kind: seconds for kind, (_, seconds) in found.items() if seconds > 5}
    assert slow == {} and mebibytes < 1024


VALUES = [None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, HUGE, -HUGE, "", "a", "q", "*", "é", "\u0000", "(", [], {}, [[]], [1], {"a": 1}, [["g", "a"]], "error", "mean"]  # fmt: skip


def _places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()  # fmt: skip
    return [at, *(place for key, value in inner for place in _places(value, (*at, key)))]


def mutated(rng: random.Random, said: Any) -> Any:
    """The description with some places changed, removed or renamed."""
    said = copy.deepcopy(said)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        *path, last = rng.choice([p for p in _places(said) if p] or [("config",)])
        node = said
        for key in path:
            node = node[key]
        kind = rng.random()
        if kind < 0.7:
            node[last] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.85 and len(said) > 1:
            del node[last]
        elif isinstance(node, dict):
            node[str(rng.choice(VALUES))[:20]] = node.pop(last)
        else:
            node.append(copy.deepcopy(rng.choice(VALUES)))
    return said


def whole() -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """A description that uses every field, and its tensors."""
    registry = flix.FeatureRegistry(
        {"g": ["a", "b"], "h": ["c"]}, implies={("g", "a"): [("h", "c")]}
    ).without_feature("g", "b")
    config = flix.FlixConfig(
        registry=registry,
        ranks=1,
        alpha={("g", "a"): 2.0},
        rank_pattern={"q": {"g": 2}, "k.*": 0},
        target_modules=["q", "k"],
        exclude_modules="x.*",
        feature_dropout=flix.FeatureDropout(0.1, per_group={"h": 0.0}),
        unknown={"z": "a"},
    )
    said = described()
    said["config"] = config.to_dict()
    said["layers"] = {**layer("q"), **layer("k"), **layer("e", kind="embedding", d_in=5)}
    said["base"] = {"name": "x", "revision": None, "fingerprint": "a-b"}
    shapes = {p: flix.core.adapter.adapter.LayerShape(s["d_in"], s["d_out"]) for p, s in said["layers"].items()}  # fmt: skip
    expected = flix.core.adapter.adapter.expected_tensors(config, shapes)
    return said, [(name, np.zeros(shape, "f4")) for name, shape in expected]


def fuzz(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Read descriptions with random changes; how many were read, and how many refused."""
    rng, (said, tensors), read = random.Random(seed), whole(), 0
    for _ in range(count):
        change = mutated(rng, said)
        write(folder, change, tensors, version=rng.choice([1, 2]))
        began = time.process_time()
        try:
            flix.load_adapter(folder)
            read += 1
        except AdapterError:
            pass
        except Exception as error:
            raise AssertionError(
                f"{type(error).__name__} for {json.dumps(change)[:2000]}"
            ) from error
        assert time.process_time() - began < 5
    return read, count - read


def test_descriptions_with_random_changes_are_refused_by_flix_alone(tmp_path: Path) -> None:
    read, refused = fuzz(tmp_path, 0, 1500)
    assert read > 30 and refused > 1000


def test_bytes_that_change_at_random_are_refused(tmp_path: Path) -> None:
    """Whatever the byte: the digest stands for the description as well as for the tensors."""
    said, tensors = whole()
    write(tmp_path, said, tensors)
    flix.load_adapter(tmp_path)
    data = (tmp_path / "flix.safetensors").read_bytes()
    rng = random.Random(0)
    for _ in range(500):
        changed = bytearray(data)
        place = rng.randrange(len(data))
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "flix.safetensors").write_bytes(bytes(changed))
        with pytest.raises(AdapterError):
            flix.load_adapter(tmp_path)


if __name__ == "__main__":
    _read_all(Path(sys.argv[1]))
