"""Hostile inputs, as hypothesis strategies: what a stranger's file or a user's slip may hold."""

from __future__ import annotations

import json
import string
import struct
from typing import Any

from hypothesis import strategies as st

NAMES = st.one_of(
    st.sampled_from(
        ["hau", "swa", "ner", "pos", "language", "task", "", " ", "hau ", "HAU", "ｈａｕ", "e\u0301", "é", "a\u200bb", "\ud800",
         "no", "on", "true", "null", "1", "1e9", "a=b", "a:b", "a+b", "a.b", "../x", "/", "%", "[x]", "\x00", "x" * 5000, "ﬁ"]
    ),
    st.text(max_size=8),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 70000),
    st.sampled_from(
        [10**400, -(10**400), 2**31, 2**63, 2**64, 0.5, 1e39, 1e308, -1e308, float("nan"), float("inf"), -0.0, True, False, "3", "1e5", None]
    ),
    st.floats(),
)  # fmt: skip
LEAVES = st.one_of(NAMES, NUMBERS, st.none(), st.booleans())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(NAMES, inner, max_size=4),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)
PATTERNS = st.one_of(
    st.sampled_from(["(a+)+$", "(a|a)*$", "(.*)*x", "(x+x+)+y", "[", "(?P<a>", "a{99999}", "(a{1,100}){1,100}", "\\1", "(?=a*)*", ".*", "", "^" * 99, "(" * 500]),
    st.text(alphabet="ab()[]{}*+?|.^$\\1,", max_size=24),
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, value: Any, depth: int = 0) -> Any:
    """A JSON value with some of its parts replaced, removed, doubled or wrapped."""
    kind = draw(st.integers(0, 9))
    if kind == 0 or depth > 7:
        return draw(VALUES)
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value, key=str)))
        new = dict(value)
        if kind == 1:
            del new[key]
        elif kind == 2:
            new[draw(NAMES)] = draw(VALUES)
        elif kind == 3:
            new[draw(NAMES)] = new.pop(key)
        else:
            new[key] = draw(changed(value[key], depth + 1))
        return new
    if isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        new_list = list(value)
        if kind == 1:
            del new_list[at]
        elif kind == 2:
            new_list.insert(at, draw(VALUES))
        elif kind == 3:
            new_list *= draw(st.sampled_from([2, 3, 50]))
        else:
            new_list[at] = draw(changed(value[at], depth + 1))
        return new_list
    if isinstance(value, str) and kind < 5:
        return draw(PATTERNS)
    return draw(LEAVES)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file's bytes with some of them flipped, cut, doubled or replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        kind, at = draw(st.integers(0, 6)), draw(st.integers(0, max(0, len(data) - 1)))
        if kind == 0 and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            end = draw(st.integers(at, min(len(data), at + 64)))
            del data[at:end]
        elif kind == 3:
            data[at:at] = draw(st.binary(max_size=32))
        elif kind == 4:
            data[:8] = struct.pack(
                "<Q", draw(st.sampled_from([0, 1, 2**20, 2**40, 2**63, len(data)]))
            )
        elif kind == 5:
            other = draw(st.integers(0, max(0, len(data) - 1)))
            data[at : at + 16] = data[other : other + 16]
        else:
            data += data[: draw(st.integers(0, 256))]
    return bytes(data)


def packed(header: Any, body: bytes) -> bytes:
    """A safetensors file of a header and its tensors' bytes."""
    text = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def unpacked(data: bytes) -> tuple[Any, bytes]:
    """Header and bytes of a safetensors file."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def yaml_texts(draw: st.DrawFn, whole: str) -> str:
    """A configuration's text with lines changed, and what YAML holds in store."""
    lines = whole.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            del lines[at]
            lines = lines or [""]
        elif kind == 1:
            key = lines[at].partition(":")[0]
            lines[at] = f"{key}: {draw(st.sampled_from(YAML_VALUES))}"
        elif kind == 2:
            lines.insert(at, draw(st.sampled_from(YAML_LINES)))
        elif kind == 3:
            lines[at] = lines[at] + draw(st.text(alphabet=string.printable, max_size=6))
        elif kind == 4:
            lines[at] = " " * draw(st.integers(0, 6)) + lines[at].lstrip()
        else:
            lines.insert(at, lines[draw(st.integers(0, len(lines) - 1))])
    return "\n".join(lines)


YAML_VALUES = ["no", "on", "yes", "~", "", "1e9", "-1", "0", ".nan", ".inf", "10" * 200, "[1, 2]", "{a: b}", "!!python/object:os.system x",
               "!!binary aGk=", "2026-11-26", "0x1F", "1_000", "'", '"', "*a", "&a 1", "|", ">", "[[[[", "{" * 900, "[" * 900, "? x", "<<: *a", "%", "@x", "`x`", "0o17", "12:30:45"]  # fmt: skip
YAML_LINES = ["a: &a [*a]", "b: &b {x: *b}", "- x", "---", "...", "\t", "? [a, b]", "<<: {x: 1}", "seed: 1", "model: x", "\ufeff", "&x : 1",
              "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f]"]  # fmt: skip
