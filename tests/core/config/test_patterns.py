"""Patterns of layer paths: the same answers as Python's own matcher, in time that grows with pattern and path alone."""

from __future__ import annotations

import random
import re
import sys
import time

import pytest

from flix import ConfigError
from flix.core.config.patterns import compiled, exactly, is_spelled_out

ATOMS = ["a", "b", r"\.", "1", ".", r"\d", r"\w", r"\s", r"\W", "[ab]", "[^a]", "[a-b1]", r"[\d.]", "^", "$", r"\A", r"\Z", ""]  # fmt: skip
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{2,}"]


def drawn(rng: random.Random, depth: int = 4) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice(ATOMS)
    inner = drawn(rng, depth - 1)
    if kind < 0.6:
        return inner + drawn(rng, depth - 1)
    if kind < 0.8:
        return f"({rng.choice(['', '?:'])}{inner}|{drawn(rng, depth - 1)})"
    return f"(?:{inner}){rng.choice(REPEATS)}"


@pytest.mark.parametrize("ending", [True, False])
def test_answers_are_those_of_pythons_own_matcher(ending):
    rng = random.Random(int(ending))
    compared = refused = matched = 0
    for _ in range(4000):
        pattern = drawn(rng)
        own = re.compile(rf"(?:.*\.)?(?:{pattern})" if ending else pattern)
        try:
            matches = compiled(pattern, "x", ending=ending)
        except ConfigError:
            refused += 1
            continue
        for _ in range(6):
            path = "".join(rng.choice("ab.1 \n") for _ in range(rng.randint(0, 7)))
            if "\n" in path and re.search(r"\$|\\Z", pattern):
                continue  # "$" also matches before a last line feed there; no layer's path has one
            wanted = own.fullmatch(path) is not None
            assert matches(path) is wanted, (pattern, path)
            compared, matched = compared + 1, matched + wanted
    assert compared > 15_000 and matched > 1000 and refused < 600


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r".*layers\.(\d+)\..*(q|v)_proj", "m.layers.10.attn.q_proj", "m.layers.x.attn.q_proj"),
        (r"^(?!.*lm_head).*proj$", "m.q_proj", "lm_head.proj"),
        (r"(?i).*Q_PROJ", "m.q_proj", "m.k_proj"),
        (r".*\bq", "m.q", "m.seq"),
        (r"(?x) .* \. q  # a comment", "m.q", "m.k"),
        (r"(?s).*q", "m\nq", "m\nk"),
        (r"(a|b)\1", "aa", "ab"),
        (r"ñ.[à-ü]", "ñ.é", "n.é"),
        (r"m\.[^ab]+", "m.cd", "m.ca"),
        (r"m\.[^\d.]", "m.x", "m.1"),
        (r"(?i:Q).x", "q.x", "q.X"),
        (r"(?>a+)b", "aab", "aa"),
        (r"(a)?(?(1)b|c)", "ab", "ac"),
        (r"(a)?(?(1)b)", "ab", "b"),
        (r"x(q|(k))$", "xk", "xv"),
        (r"m\.(q)x", "m.qx", "m.kx"),
    ],
)
def test_what_people_write(pattern, yes, no):
    matches = compiled(pattern, "x")
    assert matches(yes) is True and matches(no) is False
    assert re.fullmatch(pattern, yes) and not re.fullmatch(pattern, no)


@pytest.mark.parametrize(
    "pattern", ["(?i)Q_PROJ", "(?i:Q_PROJ)", "(?s)(?i)q_PROJ", "(?x) [qQ] _ proj"]
)
def test_flags_hold_for_the_last_components_too(pattern):
    matches = compiled(pattern, "x", ending=True)
    assert matches("q_proj") and matches("layers.1.q_proj")
    assert not matches("layers.1.k_proj") and not matches("layers.1.seq_proj")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+$", "an unbounded repeat inside another"),
        ("(?:a*b?)*", "an unbounded repeat inside another"),
        ("((x.*)y)*", "an unbounded repeat inside another"),
        ("(?:(?=a*)b)+", "an unbounded repeat inside another"),
        (r"(a|b)*\b.*x.*", "fewer"),
        (r"(?!.*x.*y.*z).*", "fewer"),
        (r"(?i)(a|aa)*b", "fewer"),
        ("(a{0,40}){0,40}", "smaller counts"),
        (".{60000}", "smaller counts"),
        ("(", "is not a regular expression"),
        ("a)|(b", "is not a regular expression"),
        ("a{2,1}", "is not a regular expression"),
        ("(" * 5000 + ")" * 5000, "is not a regular expression"),
        ("a" * 200_000, "at most 100,000"),
        (7, "must be a regular expression, got 7"),
    ],
)
@pytest.mark.parametrize("ending", [True, False])
def test_what_is_refused(pattern, message, ending):
    began = time.process_time()
    with pytest.raises(ConfigError, match=f"rank_pattern.*{message}"):
        compiled(pattern, "rank_pattern", ending=ending)
    assert time.process_time() - began < (2 if sys.gettrace() is None else 60)


@pytest.mark.parametrize(
    "pattern",
    ["(a|a)*$", "(a|aa)+$", "(.*)(.*)(.*)(.*)(.*)(.*)x", "a?" * 40 + "a" * 40, "(a?){60}b", ".*a.{12}", r"(?!.*x).*y"],
)  # fmt: skip
@pytest.mark.timed
def test_what_takes_python_for_ever_takes_moments(pattern):
    began = time.process_time()
    for path in ("a" * 200 + "!", "ab" * 120 + "!", "".join(random.Random(0).choice("ab") for _ in range(250))):  # fmt: skip
        compiled(pattern, "x", ending=False)(path)
        compiled(pattern.replace(".*x", "x"), "x", ending=True)(path)
    assert time.process_time() - began < 2


def test_a_pattern_that_goes_through_very_many_states_gives_up():
    matches = compiled(".*a.{80}", "x")
    with pytest.raises(ConfigError, match="takes too long to match"):
        for seed in range(200):
            rng = random.Random(seed)
            matches("".join(rng.choice("ab") for _ in range(1000)))


def test_long_paths_are_not_tried_out():
    with pytest.raises(ConfigError, match="at most 256 characters, got 300"):
        compiled(r"(?!x).*y", "x")("a" * 300)


def test_spelled_out_paths_are_looked_up():
    paths = ["layers.0.q", "a|b", "(c+)+", "ñ", "x\\y"]
    pattern = exactly(paths)
    assert is_spelled_out(pattern) and not is_spelled_out("^(?:a.b)") and not is_spelled_out("a")
    for ending in (True, False):
        matches = compiled(pattern, "x", ending=ending)
        assert all(map(matches, paths)) and not any(map(matches, ("layers.0", "m.layers.0.q", "", "layersx0xq")))  # fmt: skip
    many = exactly(f"layers.{i}.q" for i in range(100_000))
    assert compiled(many, "x", ending=True)("layers.99999.q")


def test_patterns_that_nest_are_matched_or_refused_at_every_depth():
    refused = set()
    for depth in range(50, 500, 10):
        try:
            matches = compiled("(" * depth + "a" + ")" * depth, "x")
        except ConfigError as error:
            refused.add(str(error).rpartition("' ")[2].partition(" (")[0])
        else:
            assert matches("a") and not matches("b") and not refused
    assert refused and refused <= {"nests too deeply", "is not a regular expression"}
