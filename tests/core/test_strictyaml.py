"""YAML as data: what harms or is read as another thing than it looks is refused, and where values stand."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flix.core.errors import SettingsError
from flix.core.strictyaml import DEEPEST, LARGEST, REPEATED, read_text, read_tree

HARM = {
    "an alias that holds itself": ("a: &a [*a]", "c:1: an alias stands for a value that it is part of"),
    "two that hold each other": ("a: &a {b: &b [*a]}", "part of"),
    "a merge of itself": ("a: &a {<<: *a}", "part of"),
    "a bomb": (
        "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
        "aliases repeat more than 100,000 values",
    ),
    "a bomb of mappings": (
        "a0: &a0 {x: 1}\n"
        + "".join(
            f"a{i + 1}: &a{i + 1} {{{','.join(f'k{j}: *a{i}' for j in range(10))}}}\n"
            for i in range(9)
        ),
        "aliases repeat more than 100,000 values",
    ),
    "depth": ("a: " + "[" * 100_000, "c:1: (not valid YAML: exceeded maximum nesting|values nest more than 50 deep)"),
    "depth that ends": ("a: " + "[" * 900 + "]" * 900, "c:1: values nest more than 50 deep"),
    "depth in blocks": ("".join(" " * i + "a:\n" for i in range(3000)), "c:51: values nest more than 50 deep"),
    "depth of dashes": ("- " * 50_000 + "x", "c:1: values nest more than 50 deep"),
    "a number of many digits": ("seed: " + "9" * 5000, "c:1: not valid YAML: a number of 5,000 characters, .*quote it"),
    "a date that is none": ("seed: 2020-99-99", "c:1: not valid YAML: '2020-99-99' is not a date"),
    "a number in base 60": ("seed: " + "1:" * 200_000 + "1", "c:1: not valid YAML: a number of 400,001 characters"),
    "a control character": ("a: \x01", "not valid YAML"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "c:1: not valid YAML: could not determine"),
    "a tag that does not fit": ("seed: !!int x", "c:1: not valid YAML: 'x' is not a number"),
    "another": ("seed: !!timestamp x", "c:1: not valid YAML: 'x' is not a date"),
    "and another": ("a: !!bool x", "c:1: not valid YAML: 'x' is not a truth value"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "an unknown alias": ("x: 1\na: *b", "c:2: not valid YAML: found undefined alias"),
    "a list as a key": ("? [a]\n: 1", "c:1: a key must be text"),
    "the same key many times": ("a: 1\n" * 20_000, r"c:2: key 'a' is given twice \(first in line 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARM)
def test_what_harms_is_refused_in_seconds(kind: str) -> None:
    text, message = HARM[kind]
    began = time.process_time()
    with pytest.raises(SettingsError, match=message) as caught:
        read_tree(text, "c")
    assert time.process_time() - began < 10
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [("no", "a truth value"), ("1", "a number"), ("1.5", "a number"), ("~", "nothing"), ("2020-01-01", "a date")],
)  # fmt: skip
def test_a_key_that_yaml_reads_as_no_text_is_to_be_quoted(key: str, kind: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_tree(f"a: 1\n{key}: x\n", "c")
    assert str(caught.value) == f"c:2: the key {key} is read by YAML as {kind}; quote it: {key!r}"
    assert read_tree(f"'{key}': x", "c").data == {key: "x"}
    with pytest.raises(SettingsError, match=f"the key {key} is read by YAML as {kind}"):
        read_tree(f"a: [{{{key}: x}}]", "c")


def test_a_key_of_nothing() -> None:
    with pytest.raises(
        SettingsError, match="c:1: the key null is read by YAML as nothing; quote it: ''"
    ):
        read_tree("?\n: x", "c")


@pytest.mark.parametrize("kind", ["depth that ends", "depth in blocks", "a bomb", "an object"])
def test_where_pyyaml_has_no_part_in_c_the_same_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    text, message = HARM[kind]
    with pytest.raises(SettingsError, match=message):
        read_tree(text, "c")


def test_lines_and_words_are_those_of_the_text() -> None:
    tree = read_tree("a: on\nb:\n  - 7\n  - x: ''\n    y:\n  - '7'\n", "c")
    assert tree.data == {"a": True, "b": [7, {"x": "", "y": None}, "7"]}
    assert tree.words == {
        ("a",): ("on", "a truth value"),
        ("b", 0): ("7", "a number"),
        ("b", 1, "y"): ("", "nothing"),
    }
    assert tree.lines == {
        (): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "x"): 4, ("b", 1, "y"): 5, ("b", 2): 6,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n...\n"])
def test_a_text_of_nothing(text: str) -> None:
    assert read_tree(text, "c").data is None


def test_aliases_and_merges_serve_as_they_should() -> None:
    text = "shared: &shared {task: ner}\nlist: [*shared, *shared]\nmerged: {<<: *shared, language: hau}\n"
    tree = read_tree(text, "c")
    assert tree.data["list"] == [{"task": "ner"}] * 2
    assert tree.data["merged"] == {"task": "ner", "language": "hau"}
    assert tree.lines["merged", "language"] == 3 and tree.lines["list", 1, "task"] == 1
    many = "a: &a [" + ",".join(["x"] * 99) + "]\nb: [" + ",".join(["*a"] * 900) + "]\n"
    assert len(read_tree(many, "c").data["b"]) == 900 and REPEATED > 900 * 100
    # A large file without aliases is only large.
    big = "a: [" + ",".join(["x"] * 150_000) + "]\n"
    assert len(read_tree(big, "c").data["a"]) == 150_000


def test_values_nest_as_deep_as_it_says() -> None:
    for depth in (DEEPEST, DEEPEST + 1):
        text = "[" * depth + "x" + "]" * depth
        if depth <= DEEPEST:
            assert read_tree(text, "c").data
        else:
            with pytest.raises(SettingsError, match=f"values nest more than {DEEPEST} deep"):
                read_tree(text, "c")


def test_a_file_is_read_without_its_mark(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\n")
    assert read_text(file) == "a: é\n"
    file.write_bytes(b"#" * LARGEST)
    assert len(read_text(file)) == LARGEST
    file.write_bytes(b"#" * (LARGEST + 1))
    with pytest.raises(SettingsError, match=r"c\.yaml: larger than 4 MB, too large for a config"):
        read_text(file)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "c.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "a\0b", "embedded null byte"),
    ):
        with pytest.raises(SettingsError) as caught:
            read_text(path)
        assert str(caught.value) == f"{path}: cannot be read: {reason}"
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(SettingsError, match=r"c\.yaml: not UTF-8 text \(invalid start byte\)"):
        read_text(tmp_path / "c.yaml")


KEYS = st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | KEYS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_pyyaml_writes_is_read_and_every_place_has_its_line(value: Any) -> None:
    import yaml

    text = yaml.safe_dump(value, allow_unicode=True, default_flow_style=False)
    tree = read_tree(text, "c")
    assert tree.data == value and list(_places(value)) == sorted(tree.lines, key=_order(value))
    lines = text.count("\n")
    assert all(1 <= line <= lines for line in tree.lines.values())
    for place, (_, kind) in tree.words.items():
        assert not isinstance(_at(value, place), str), kind


def _places(value: Any, place: tuple[Any, ...] = ()) -> Any:
    yield place
    for key, inner in _items(value):
        yield from _places(inner, (*place, key))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _order(value: Any) -> Any:
    return {place: number for number, place in enumerate(_places(value))}.__getitem__


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for part in place:
        value = value[part]
    return value


@given(st.integers(0, 2**32))
def test_texts_with_random_changes_are_read_or_refused_in_one_line(seed: int) -> None:
    rng = random.Random(seed)
    text = "a: &x {b: [1, on, 'q', ~], c: 2020-01-01}\nd: *x\ne:\n  - !!str f\n  - |\n    g\n"
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = (
            text[:at]
            + rng.choice(["", *"&*!{}[]:,-?|>%@`#'\"\n\t \0é1~", "<<: ", "!!int ", "..."])
            + text[at + rng.randint(0, 3) :]
        )
    try:
        read_tree(text, "c")
    except SettingsError as error:
        assert str(error).startswith("c") and "\n" not in str(error)


TAGS = [
    "null",
    "bool",
    "int",
    "float",
    "binary",
    "timestamp",
    "omap",
    "pairs",
    "set",
    "str",
    "seq",
    "map",
    "merge",
    "value",
    "yaml",
    "none",
]
VALUES = [
    "''", "x", "-", "+", "_", "'.'", "0x", "0b_", "'0o'", "1e999", "'-0'", "'1:'", "2020-13-01", "'2020-01-01T99:00:00Z'",
    "'2020-01-01 00:00:00+99:99'", "9" * 5000, "é", "[]", "[a]", "{}", "{a: b}", "*none", "&a x", "0x" + "f" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_no_value_of_any_tag_ends_in_another_error_than_a_line_with_its_place(tag: str) -> None:
    for value in VALUES:
        for text in ("{}", "\n  - {}", "x\n? {}\n: 1"):
            try:
                read_tree("a: " + text.format(f"!!{tag} {value}"), "c")
            except SettingsError as error:
                assert re.fullmatch(r"c:\d: .{,400}", str(error)), (tag, value)
