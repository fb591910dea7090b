"""YAML as data that says where its values stand; what could harm, or is read as something else, is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.errors import SettingsError, shown

Place = tuple[Any, ...]
"""The way to a value: keys and positions, e.g. ``("datasets", 0, "files")``."""

LARGEST = 4 * 1024 * 1024
DEEPEST = 50
LONGEST = 1000
"""The most characters of a number or a date: what YAML does to one may cost the square of its length."""
REPEATED = 100_000
"""The most values that aliases may repeat: a few lines of them can stand for more than any memory holds."""

_KINDS = {
    "bool": "a truth value",
    "int": "a number",
    "float": "a number",
    "null": "nothing",
    "timestamp": "a date",
}


@dataclass(frozen=True)
class Tree:
    """What a YAML file holds.

    Attributes:
        data: its value.
        lines: the line of every key and value.
        words: how the values that stand without quotes and that YAML reads as something else than text are written, and
            what YAML reads them as.
    """

    data: Any
    lines: dict[Place, int]
    words: dict[Place, tuple[str, str]]


def read_text(file: Path) -> str:
    """A file's text; a byte-order mark is passed over.

    Raises:
        SettingsError: it cannot be read, is no UTF-8 text, or is larger than any configuration.
    """
    try:
        with open(file, "rb") as opened:
            data = opened.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{file}: cannot be read: {reason}") from None
    if len(data) > LARGEST:
        raise SettingsError(
            f"{file}: larger than {LARGEST >> 20} MB, too large for a configuration"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: not UTF-8 text ({error.reason})") from None


def read_tree(text: str, name: str) -> Tree:
    """The tree of a YAML text.

    Args:
        text: the text.
        name: what to call it in messages.

    Raises:
        SettingsError: no YAML, a key that is no text or is given twice, an alias that holds itself, aliases that repeat
            too much, or values that nest too deeply; the line is named.
    """
    import yaml

    loader = None
    try:
        # The one in C where it was built: five times as fast.
        kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        _check_depth(yaml.parse(text, kind), name)
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return Tree(None, {}, {})
        walk = _Walk(name, loader)
        walk.visit(node, (), ())
        return Tree(loader.construct_document(node), walk.lines, walk.words)
    except SettingsError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SettingsError(f"{where}: not valid YAML: {reason}") from None
    except RecursionError:
        raise SettingsError(f"{name}: not valid YAML: it nests too deeply") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML's own, for what nobody thought of.
        raise SettingsError(f"{name}: not valid YAML: {shown(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(events: Iterable[Any], name: str) -> None:
    """Refuse what nests too deeply before its tree is built: PyYAML's part in C calls itself for every level, and on
    Python 3.12 the process ends there, without an error that could be caught.
    """
    from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

    depth = 0
    for event in events:
        if depth > DEEPEST and isinstance(event, CollectionStartEvent | ScalarEvent | AliasEvent):
            mark: Any = event.start_mark
            raise SettingsError(f"{name}:{mark.line + 1}: values nest more than {DEEPEST} deep")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)


class _Walk:
    """Goes through a tree once, as it will be built: what aliases stand for is counted each time."""

    def __init__(self, name: str, loader: Any) -> None:
        self.name = name
        self.loader = loader
        self.lines: dict[Place, int] = {}
        self.words: dict[Place, tuple[str, str]] = {}
        self._known: set[int] = set()
        self._repeated = 0

    def visit(self, node: Any, place: Place, above: tuple[int, ...]) -> None:
        """Note a node and what is in it.

        Args:
            node: the node.
            place: where it stands.
            above: the nodes that it is in, by identity.
        """
        import yaml

        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        if id(node) in above:
            raise self._error(line, "an alias stands for a value that it is part of")
        if len(above) > DEEPEST:
            raise self._error(line, f"values nest more than {DEEPEST} deep")
        self._repeated += id(node) in self._known
        self._known.add(id(node))
        if self._repeated > REPEATED:
            raise self._error(line, f"aliases repeat more than {REPEATED:,} values")
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                text = self._key(key, seen)
                self.visit(value, (*place, text), above)
                self.lines[(*place, text)] = key.start_mark.line + 1
            return
        if isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self.visit(value, (*place, number), above)
            return
        self._check(node, line)
        if not node.style and _kind(node) in _KINDS:
            self.words[place] = (node.value, _KINDS[_kind(node)])

    def _check(self, node: Any, line: int) -> None:
        """Refuse a value that is not what its tag says, here where its line is known."""
        import yaml

        kind = _kind(node)
        if kind not in _KINDS:
            return
        what = _KINDS[kind]
        if kind != "null" and len(node.value) > LONGEST:
            raise self._error(
                line,
                f"not valid YAML: {what} of {len(node.value):,} characters, {shown(node.value, 40)}; quote it if it is text",
            )
        try:
            self.loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except (
            Exception
        ):  # PyYAML's own, of many kinds: a KeyError, an IndexError, an AttributeError
            raise self._error(
                line, f"not valid YAML: {shown(node.value, 60)} is not {what}"
            ) from None

    def _key(self, key: Any, seen: dict[str, int]) -> str:
        import yaml

        line = key.start_mark.line + 1
        kind = _kind(key)
        if not isinstance(key, yaml.ScalarNode) or kind not in ("str", "merge", "value", *_KINDS):
            raise self._error(line, "a key must be text")
        text = str(key.value)
        if kind in _KINDS:
            raise self._error(
                line,
                f"the key {text[:60] or 'null'} is read by YAML as {_KINDS[kind]}; quote it: {shown(text, 60)}",
            )
        if text in seen:
            raise self._error(
                line, f"key {shown(text)} is given twice (first in line {seen[text]})"
            )
        seen[text] = line
        return text

    def _error(self, line: int, reason: str) -> SettingsError:
        return SettingsError(f"{self.name}:{line}: {reason}")


def _kind(node: Any) -> str:
    return str(node.tag).removeprefix("tag:yaml.org,2002:")
