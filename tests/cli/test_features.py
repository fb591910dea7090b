"""Features in options: what flix writes of features can be given to it, whatever their names hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flix
from flix.cli.features import parse_choice, parse_combinations, parse_features, parse_folders
from flix.core.errors import FeatureError
from flix.core.features.cells import cell_name, cell_of
from flix.core.features.names import normal_group, normal_name


def _kept(group: str, name: str) -> bool:
    try:
        return normal_group(group) == group and normal_name(group, name) == name
    except FeatureError:
        return False


odd = st.text("ab\"\\\\+,=:|{}[]*@#' .5é", min_size=1, max_size=6)
features = st.tuples(odd, odd).filter(lambda pair: _kept(*pair))


@settings(max_examples=300, deadline=None)
@given(st.lists(features, min_size=1, max_size=5, unique=True), st.data())
@example([("g", "a"), ("g", '"a"'), ("g", "a,g=a")], None)
def test_every_feature_is_read_as_cells_show_it(known: list[tuple[str, str]], data: Any) -> None:  # fmt: skip
    """Each alone, and some together, among other features that look alike."""
    groups: dict[str, list[str]] = {}
    for group, name in known:
        groups.setdefault(group, []).append(name)
    registry = flix.FeatureRegistry(groups)
    for group, name in known:
        text = cell_name(cell_of({group: name}))
        assert parse_features([text], registry) == {group: name}
        assert parse_choice([text], registry) == [(group, name)]
        if not text.startswith("@"):  # a file
            assert parse_combinations([text], registry) == [{group: name}]
    row: dict[str, Any] = dict(known)
    if data is not None:
        row = {g: data.draw(st.lists(st.sampled_from(n), min_size=1, unique=True)) for g, n in groups.items()}  # fmt: skip
    found = parse_features([cell_name(cell_of(row))], registry)
    assert cell_of(found) == cell_of(row)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('language="a,b",task=ner', {"language": "a,b", "task": "ner"}),
        ('language="a,b"+c:0.5', {"language": {"a,b": 1.0, "c": 0.5}}),
        ('language="a,b":0.5 + "c"', {"language": {"a,b": 0.5, "c": 1.0}}),
        ('"task"="ner"', {"task": "ner"}),
        ('language = "say \\"x\\""', {"language": 'say "x"'}),
        ('language=say "x"', {"language": 'say "x"'}),
        ("language=a,b", {"language": "a,b"}),  # where it is all that there is
        ("language=c+d", {"language": {"c": 1.0, "d": 1.0}}),
        ('language="c+d"', {"language": "c+d"}),
    ],
)
def test_names_in_quotes(text: str, wanted: object) -> None:
    names = ["a,b", "c", "d", "c+d", 'say "x"']
    registry = flix.FeatureRegistry({"language": names, "task": ["ner"]})
    assert parse_features([text], registry) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('language="a,x"', "has no feature 'a,x'"),
        ('language="a:0.5"', "has no feature 'a:0.5'"),
        ('language="a\\d"', "is not quoted as in JSON"),
        ('language="a', "has no feature"),
    ],
)
def test_mistakes_in_quotes(text: str, message: str) -> None:
    registry = flix.FeatureRegistry({"language": ["a", "a,b"]})
    for parse in (parse_features, parse_choice, parse_combinations):
        with pytest.raises(FeatureError, match=message):
            parse([text], registry)


def test_choices_and_folders_in_quotes() -> None:
    registry = flix.FeatureRegistry({"language": ["a|b", "a", "b"]})
    assert parse_combinations(["language=a|b"], registry) == [{"language": "a"}, {"language": "b"}]
    assert parse_combinations(['language="a|b"|a'], registry) == [{"language": "a|b"}, {"language": "a"}]  # fmt: skip
    assert parse_choice(['language=a,language="a|b"'], registry) == [("language", "a"), ("language", "a|b")]  # fmt: skip
    assert parse_folders(['"a=b"=x=y', "c=z"]) == {"a=b": Path("x=y"), "c": Path("z")}
