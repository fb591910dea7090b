r"""Regular expressions for layer paths, matched in time that grows with pattern and path alone.

Python's own matcher tries one way after another: ``(a+)+$`` takes longer than anybody waits, and ``.*.*.*x`` grows with
the cube of a path. Patterns come in files from strangers. So a pattern becomes an automaton that follows all ways at
once; which of its states a character leads to is kept, so that most steps are one lookup. The rules
(docs/specification.md §4.6):

- an unbounded repeat inside an unbounded repeat is refused: ``(a+)+``, ``(x.*)*``;
- what automata lack (look-ahead and look-behind, back-references, ``\b``, flags such as ``(?i)``) is left to Python's
  matcher, where there is nothing to try out: at most two repeats (one in ``rank_pattern``), none inside another, no
  alternatives inside one, paths of at most 256 characters.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from flix.core.errors import ConfigError

_GLOBAL_FLAGS = re.compile(r"(?:\(\?[aiLmsux]+\))*")
_LONGEST = 100_000
_LONGEST_TRIED = 256
_MOST_KEPT = 20_000
_MOST_WORK = 5_000_000
"""Steps that no lookup spares, for one pattern; more than any set of layers needs."""
_FLAGS = re.UNICODE | re.VERBOSE | re.DOTALL
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda c: c.isalnum() or c == "_",
}
_PIECES = re.compile(r"\\(.)|(\|)|([^\\|]+)", re.DOTALL)
_Edge = tuple[Callable[[str], bool], int]


class Effort:
    """How much has been worked out in this process, for those who read many patterns at once.

    Attributes:
        steps: lookups of a character; what no lookup spared counts for more.
    """

    steps = 0


effort = Effort()


class _UnsupportedError(Exception):
    """An automaton cannot do it."""


def exactly(paths: Iterable[str]) -> str:
    """A pattern that matches exactly these paths."""
    return f"^(?:{'|'.join(map(re.escape, paths))})"


def compiled(pattern: object, what: str, *, ending: bool = False) -> Callable[[str], bool]:
    """Whether a path matches a pattern, as a function.

    Args:
        pattern: a regular expression.
        what: what it is, for messages.
        ending: it is for a path's last components; otherwise for the whole path.

    Raises:
        ConfigError: no regular expression, or one that breaks the rules above.
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"{what} must be a regular expression, got {pattern!r}")
    try:
        return _compiled(pattern, ending)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str, ending: bool) -> Callable[[str], bool]:
    if (paths := _spelled_out(pattern)) is not None:
        return paths.__contains__
    shown = repr(pattern[:100])
    if len(pattern) > _LONGEST:
        raise ConfigError(f"{shown}... has {len(pattern):,} characters; at most {_LONGEST:,}")
    try:
        _parsed(pattern)  # by itself, so that it closes no bracket of what is put around it
        # Flags for the whole expression may only stand at its start.
        flags = _GLOBAL_FLAGS.match(pattern)[0]  # type: ignore[index]
        whole = rf"{flags}(?:.*\.)?(?:{pattern[len(flags) :]})" if ending else pattern
        tree = _parsed(whole)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{shown} is not a regular expression ({error})") from None
    try:
        if _nests(tree, unbounded=True):
            raise ConfigError(
                f"{shown} has an unbounded repeat inside another, which can take forever to "
                f"match; write it with one of them"
            )
        try:
            if tree.state.flags & ~_FLAGS:
                raise _UnsupportedError
            return _Automaton(tree, len(pattern), shown).matches
        except _UnsupportedError:
            pass
        if _repeats(tree) > 2 or _nests(tree, unbounded=False):
            raise ConfigError(
                f"{shown} has a look-around, a back-reference, a flag or \\b together with more than "
                f"{'one repeat' if ending else 'two repeats'}, or with repeats or alternatives inside a repeat, "
                "which can take forever to match; write it with fewer"
            )
    except RecursionError:
        raise ConfigError(f"{shown} nests too deeply") from None
    return functools.partial(_tried, re.compile(whole), shown)


def _parsed(pattern: str) -> Any:
    with warnings.catch_warnings():  # of what future versions may read otherwise
        warnings.simplefilter("ignore", FutureWarning)
        return _parser.parse(pattern)


def _tried(pattern: re.Pattern[str], shown: str, path: str) -> bool:
    if len(path) > _LONGEST_TRIED:
        raise ConfigError(
            f"{shown} is matched against paths of at most {_LONGEST_TRIED} characters, got {len(path)}"
        )
    return pattern.fullmatch(path) is not None


def is_spelled_out(pattern: str) -> bool:
    """Whether a pattern is one of :func:`exactly`'s, which costs nothing to match."""
    return _spelled_out(pattern) is not None


@functools.lru_cache(maxsize=4096)
def _spelled_out(pattern: str) -> frozenset[str] | None:
    if not (pattern.startswith("^(?:") and pattern.endswith(")")):
        return None
    found = [""]
    for escaped, bar, plain in _PIECES.findall(pattern[4:-1]):
        if bar:
            found.append("")
        else:
            found[-1] += escaped or plain
    return frozenset(found) if exactly(found) == pattern else None


def _children(item: tuple[Any, Any]) -> tuple[Any, ...]:
    """The patterns inside an item of a parsed pattern."""
    name, value = str(item[0]), item[1]
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return (value[2],)
    if name == "SUBPATTERN":
        return (value[3],)
    if name == "BRANCH":
        return tuple(value[1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return (value[1],)
    if name == "ATOMIC_GROUP":
        return (value,)
    if name == "GROUPREF_EXISTS":
        return tuple(part for part in value[1:] if part is not None)
    return ()


def _is_repeat(item: tuple[Any, Any], unbounded: bool) -> bool:
    if not str(item[0]).endswith("_REPEAT"):
        return False
    most = item[1][1]
    return most is _parser.MAXREPEAT if unbounded else most is _parser.MAXREPEAT or most > 1


def _nests(tree: Any, unbounded: bool, inside: bool = False) -> bool:
    """Whether a repeat stands inside a repeat; of any that is more than optional, alternatives count, too."""
    for item in tree:
        repeat = _is_repeat(item, unbounded)
        if inside and (repeat or (not unbounded and str(item[0]) == "BRANCH")):
            return True
        if any(_nests(child, unbounded, inside or repeat) for child in _children(item)):
            return True
    return False


def _repeats(tree: Any) -> int:
    return sum(
        _is_repeat(item, False) + sum(_repeats(child) for child in _children(item)) for item in tree
    )


def _suffix(tree: Any) -> tuple[str, bool]:
    """The letters that whatever matches ends with, and whether it is them alone; most paths differ there."""
    found = ""
    for name, value in reversed(list(tree)):
        if str(name) == "LITERAL":
            found = chr(value) + found
        elif str(name) == "SUBPATTERN":
            inner, alone = _suffix(value[3])
            found = inner + found
            if not alone:
                return found, False
        elif not (str(name) == "AT" and str(value).startswith("AT_END")):
            return found, False
    return found, True


class _Automaton:
    """A pattern that follows all ways at once.

    Its states are numbers; a character leads from one to others (edges), and nothing does (jumps): always, or only
    where the path starts (``^``) or ends (``$``).
    """

    def __init__(self, tree: Any, length: int, shown: str) -> None:
        self._shown, self._most = shown, 4 * length + 300
        self._suffix = _suffix(tree)[0]
        self._edges: list[list[_Edge]] = []
        self._jumps: list[list[tuple[str, int]]] = []
        self._work = 0
        start = self._state()
        self._end = self._sequence(tree, start, bool(tree.state.flags & re.DOTALL))
        self._ends: dict[frozenset[int], bool] = {}
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._first = self._reached([start], "^")
        self._empty = self._end in self._reached([start], "^$")

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        if not path:
            return self._empty
        if not path.endswith(self._suffix):
            return False
        effort.steps += len(path)
        states, steps = self._first, self._steps
        for character in path:
            found = steps.get((states, character))
            states = self._step(states, character) if found is None else found
            if not states:
                return False
        if states not in self._ends:
            self._ends[states] = self._end in self._reached(states, "$")
        return self._ends[states]

    def _step(self, states: frozenset[int], character: str) -> frozenset[int]:
        effort.steps += 5 * len(states)
        self._work += len(states)
        if self._work > _MOST_WORK:
            raise ConfigError(f"{self._shown} takes too long to match; write it more simply")
        if len(self._steps) > _MOST_KEPT:
            self._steps.clear()
            self._ends.clear()
        found = self._reached(
            [to for state in states for fits, to in self._edges[state] if fits(character)], ""
        )
        self._steps[states, character] = found
        return found

    def _reached(self, states: Iterable[int], where: str) -> frozenset[int]:
        """These states and those that nothing leads to from them."""
        found = set(states)
        left = list(found)
        while left:
            for when, to in self._jumps[left.pop()]:
                if (not when or when in where) and to not in found:
                    found.add(to)
                    left.append(to)
        return frozenset(found)

    def _state(self) -> int:
        if len(self._edges) > self._most:
            raise ConfigError(f"{self._shown} repeats too much; write it with smaller counts")
        self._edges.append([])
        self._jumps.append([])
        return len(self._edges) - 1

    def _sequence(self, tree: Any, start: int, dots: bool) -> int:
        """Add a pattern's states from one on; where it ends."""
        at = start
        for item in tree:
            at = self._item(item, at, dots)
        return at

    def _item(self, item: tuple[Any, Any], start: int, dots: bool) -> int:
        name, value = str(item[0]), item[1]
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(value, start, dots)
        if name == "SUBPATTERN":
            if value[1] or value[2]:
                raise _UnsupportedError
            return self._sequence(value[3], start, dots)
        end = self._state()
        if name == "BRANCH":
            for one in value[1]:
                first = self._state()
                self._jumps[start].append(("", first))
                self._jumps[self._sequence(one, first, dots)].append(("", end))
        elif name == "AT":
            when = {"AT_BEGINNING": "^", "AT_BEGINNING_STRING": "^", "AT_END": "$", "AT_END_STRING": "$"}  # fmt: skip
            if str(value) not in when:
                raise _UnsupportedError
            self._jumps[start].append((when[str(value)], end))
        else:
            self._edges[start].append((_character(name, value, dots), end))
        return end

    def _repeat(self, given: tuple[int, Any, Any], start: int, dots: bool) -> int:
        (least, most, tree), at = given, start
        for _ in range(least):
            at = self._sequence(tree, at, dots)
            self._state()  # also of what is empty there must be no end
        if most is _parser.MAXREPEAT:
            loop, end = self._state(), self._state()
            self._jumps[at].append(("", loop))
            self._jumps[self._sequence(tree, loop, dots)].append(("", loop))
            self._jumps[loop].append(("", end))
            return end
        end = self._state()
        for _ in range(most - least):
            self._jumps[at].append(("", end))
            at = self._sequence(tree, at, dots)
            self._state()
        self._jumps[at].append(("", end))
        return end


def _character(name: str, value: Any, dots: bool) -> Callable[[str], bool]:
    """Whether a character is one that an item stands for."""
    if name == "LITERAL":
        return chr(value).__eq__
    if name == "NOT_LITERAL":
        return chr(value).__ne__
    if name == "ANY":
        return (lambda c: True) if dots else "\n".__ne__
    if name != "IN":
        raise _UnsupportedError
    tests: list[Callable[[str], bool]] = []
    negated = False
    for kind, given in value:
        kind = str(kind)
        if kind == "NEGATE":
            negated = True
        elif kind == "RANGE":
            low, high = map(chr, given)
            tests.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
        elif kind == "CATEGORY":
            category = str(given).removeprefix("CATEGORY_")
            positive = _CATEGORIES.get(category.removeprefix("NOT_"))
            if positive is None:
                raise _UnsupportedError
            no = category.startswith("NOT_")
            tests.append(lambda c, f=positive, no=no: f(c) is not no)  # type: ignore[misc]
        else:
            tests.append(_character(kind, given, dots))
    return lambda c: any(test(c) for test in tests) is not negated
