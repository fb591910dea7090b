"""What adapters say of themselves: read, or refused by the error of a damaged file."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from flix import AdapterError, FeatureDropout, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.described import Base
from flix.core.adapter.description import as_metadata, described, from_metadata, read

REGISTRY = FeatureRegistry({"g": ["a", "b"], "h": ["c"]}, {("h", "*"): [("g", "a")]})
CONFIG = FlixConfig(
    registry=REGISTRY,
    ranks=2,
    alpha=2.0,
    rank_pattern={"q": {"h": 1}},
    alpha_pattern={"q": {"h": 1.0}},
    unknown={"x": "a"},
    feature_dropout=FeatureDropout(per_group={"h": 0.1}),
)
LAYERS = {"a.q": LayerShape(3, 2), "e": LayerShape(4, 5, experts=2)}
SAID = json.loads(json.dumps(described(CONFIG, LAYERS, {"head": None}, Base("org/m", "abc"))))


def test_what_is_described_is_read_again() -> None:
    for found in (read(SAID, "f"), from_metadata(as_metadata(SAID), "f")):
        assert found is not None
        assert found.config == CONFIG and found.layers == LAYERS
        assert found.heads == ("head",) and found.base == Base("org/m", "abc")


def test_the_metadata_of_version_1_describes_nothing() -> None:
    assert from_metadata({"format": "pt"}, "f") is None and from_metadata({}, "f") is None
    short = {name: text for name, text in as_metadata(SAID).items() if name != "base"}
    assert from_metadata(short, "f").base is None  # type: ignore[union-attr]


def changed(*place: Any, value: Any) -> Any:
    said = copy.deepcopy(SAID)
    inner = said
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "f does not describe a flix adapter (no 'format': 'flix')"),
        (changed("format", value="pt"), "f does not describe a flix adapter (no 'format': 'flix')"),
        (changed("version", value=3), "f has format version 3; this flix reads versions 1 and 2"),
        (changed("version", value=True), "f has format version True; this flix reads versions 1 and 2"),
        (changed("version", value="2"), "f has format version '2'; this flix reads versions 1 and 2"),
        (changed("sha256", value=7), "f is damaged or was altered: its digest is int"),
        (changed("heads", value="head"), "f is damaged or was altered: its heads are not a list of names"),
        (changed("heads", value=["x", "x"]), "f is damaged or was altered: it names a head twice"),
        (changed("base", value={"name": 5}), "f is damaged or was altered: its base is described by something other than texts"),
        (changed("layers", "a.q", "d_in", value="3"), "f describes the layer 'a.q' wrongly: kind 'linear', d_in '3', d_out 2, experts 0"),
        (changed("layers", "e", "kind", value="embedding"), "f describes the layer 'e' wrongly: kind 'embedding', d_in 4, d_out 5, experts 2"),
        (changed("layers", "e", "experts", value=-1), "f describes the layer 'e' wrongly: kind 'linear', d_in 4, d_out 5, experts -1"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(said: Any, message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        read(said, "f")
    assert str(caught.value) == message


def places(inner: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()  # fmt: skip
    return [place][not place :] + [p for key, value in items for p in places(value, (*place, key))]


@pytest.mark.parametrize("key", [None, "g"])
def test_values_that_nest_beyond_all_depth_are_refused_wherever_they_stand(key: str | None) -> None:
    """Python's own limit is another one in each version, for reading JSON and for what is done with it."""
    deep: Any = 1
    for _ in range(20_000):
        deep = [deep] if key is None else {key: deep}
    refused = 0
    for place in places(SAID):
        try:
            read(changed(*place, value=deep), "f")
        except AdapterError as error:
            refused += 1
            assert len(str(error)) < 2500
    assert refused > 20
