"""Reading ``--features language=hau,task=ner`` and ``name=FOLDER``.

A group or name may stand in double quotes, as cells are shown: ``language="a,b"``. What is in quotes is one name,
whatever it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from flix.core.errors import ConfigError, FeatureError
from flix.core.features.cells import unquoted
from flix.core.features.encoding import Row
from flix.core.features.names import Feature, normal_group
from flix.core.features.registry import FeatureRegistry

# Before anything but a sign or the end, quotes are part of a name, as they were when names could not be quoted.
_QUOTED = re.compile(r'\s*"(?:[^"\\]|\\.)*"\s*(?=[,=+|:]|$)', re.DOTALL)


def parse_features(texts: Sequence[str], registry: FeatureRegistry) -> Row:
    """The row that the option spells out.

    ``group=name`` parts are separated by commas, several names of a group by ``+``, and ``name:0.5`` weights one.

    Args:
        texts: the option's values.
        registry: names that hold ``+`` or ``:`` are recognised by it, also without quotes.

    Raises:
        FeatureError: a part of another form, a group given twice, an unknown group or feature, or a weight that is
            no number.
    """
    row: dict[str, str | dict[str, float]] = {}
    for part in _parts(texts, registry):
        group, value = _divided(part, registry)
        if group in row:
            raise FeatureError(
                f"--features: group {group!r} is given twice; join names with '+': {group}=a+b"
            )
        row[group] = _value(group, value, registry)
    if not row:
        raise FeatureError("--features names no feature; write, e.g., language=hau,task=ner")
    registry.encode([row])
    return row


def parse_combinations(texts: Sequence[str], registry: FeatureRegistry) -> list[Row]:
    """The rows that ``--all`` spells out: every choice of one value a group.

    A value is written as in ``--features``; ``|`` stands between values to choose from, and ``*`` for every feature of
    the group. ``@FILE`` reads such a text from each line of a file, but for empty ones and those that begin with "#".

    Raises:
        FeatureError: as for ``--features``, or a row that is named twice.
        ConfigError: a file that cannot be read.
    """
    rows: list[Row] = []
    for text in _lines(texts):
        choices: dict[str, list[Any]] = {}
        for part in _parts([text], registry):
            group, value = _divided(part, registry)
            if group in choices:
                raise FeatureError(f"--all: group {group!r} is given twice in {text!r}")
            if value.strip() == "*":
                choices[group] = [name for other, name in registry.live if other == group]
            else:
                whole = _alone(group, value, registry, "|") is not None
                pieces = [value] if whole else _split(value, "|")
                choices[group] = [_value(group, piece.strip(), registry) for piece in pieces]
        rows += [dict(zip(choices, chosen, strict=True)) for chosen in product(*choices.values())]
    rows = [row for row in rows if row]
    if not rows:
        raise FeatureError("--all names no combination; write, e.g., 'language=*,task=ner|pos'")
    for number, row in enumerate(rows):
        if row in rows[:number]:
            raise FeatureError(f"--all names {row!r} twice")
    return rows


def _lines(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        if not text.startswith("@"):
            yield text
            continue
        try:
            content = Path(text[1:]).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--all: {text[1:]!r} cannot be read: {error}") from None
        lines = (line.strip() for line in content.splitlines())
        yield from (line for line in lines if line and not line.startswith("#"))


def _parts(texts: Sequence[str], registry: FeatureRegistry) -> Iterator[str]:
    """What commas part; a text that is one feature's whole name, without quotes, is one part.

    Not where all its parts are features, too: cells are written so.
    """
    for text in texts:
        parts = [part.strip() for part in _split(text, ",") if part.strip()]
        whole = _is_feature(text, registry) and not all(_is_feature(p, registry) for p in parts)
        yield from [text.strip()] if whole else parts


def _is_feature(text: str, registry: FeatureRegistry) -> bool:
    return any(_known(*feature, registry) is not None for feature in _divisions(text))


def _split(text: str, sign: str) -> list[str]:
    """A text's pieces between signs that do not stand in quotes."""
    pieces, start, place, begins = [], 0, 0, True
    while place < len(text):
        if begins and (quotes := _QUOTED.match(text, place)):
            place, begins = quotes.end(), False
            continue
        if text[place] == sign:
            pieces.append(text[start:place])
            start = place + 1
        begins = text[place] in ",=+|"
        place += 1
    return [*pieces, text[start:]]


def _divisions(text: str) -> list[Feature]:
    """Every way to read a text as group=name: groups and names may hold "=", too. Names are as they were written."""
    pieces = _split(text, "=")
    found = [("=".join(pieces[:i]).strip(), "=".join(pieces[i:]).strip()) for i in range(1, len(pieces))]  # fmt: skip
    if found and (group := _in_quotes(pieces[0])) is not None:
        found.insert(0, (group, found[0][1]))
    return found


def _in_quotes(text: str) -> str | None:
    """What stands in a text's quotes; None if it is not quoted as in JSON."""
    try:
        return unquoted(text.strip()) if _QUOTED.fullmatch(text) else None
    except FeatureError:
        return None


def _known(group: str, text: str, registry: FeatureRegistry) -> str | None:
    """The name of the feature that a text is, in quotes or as it stands; None if there is no such feature."""
    said = (_in_quotes(text), text)
    return next((name for name in said if name is not None and (group, name) in registry), None)


def _alone(group: str, text: str, registry: FeatureRegistry, sign: str = "+") -> str | None:
    """The name that a value is, where it is no list of known names between signs."""
    pieces = _split(text, sign)
    if len(pieces) > 1 and all(_known(group, piece.strip(), registry) is not None for piece in pieces):  # fmt: skip
        return None
    return _known(group, text, registry)


def _divided(part: str, registry: FeatureRegistry) -> Feature:
    """Group and value of a part, the value as it was written.

    Raises:
        FeatureError: it is not of the form group=name, or there is no such group.
    """
    found = _divisions(part)
    if not found or not all(found[0]):
        like = f"; write {part.replace(':', '=', 1)!r}" if ":" in part and not found else ""
        raise FeatureError(f"--features: {part!r} is not of the form group=name{like}")
    known = [f for f in found if _known(*f, registry) is not None]
    known = known or [f for f in found if f[0] in registry.groups]
    group, value = (known or found)[0]
    registry.ids_of(group)
    return normal_group(group), value


def _value(group: str, text: str, registry: FeatureRegistry) -> str | dict[str, float]:
    if (whole := _alone(group, text, registry)) is not None:
        return whole
    weights: dict[str, float] = {}
    for piece in _split(text, "+"):
        given, colon, weight = piece.strip(), "", ""
        if _known(group, given, registry) is None and not _QUOTED.fullmatch(given):
            given, colon, weight = given.rpartition(":")
            if not colon:
                given = weight
        name = _name(group, given, registry)
        try:
            weights[name] = weights.get(name, 0.0) + (float(weight) if colon else 1.0)
        except ValueError:
            raise FeatureError(
                f"--features: the weight of {group}={name} must be a number, got {weight!r}"
            ) from None
    return weights


def _name(group: str, text: str, registry: FeatureRegistry) -> str:
    """The name of a feature that is known, whose name may stand in quotes.

    Raises:
        FeatureError: there is no such feature.
    """
    if (found := _known(group, text, registry)) is None:
        found = unquoted(text) if _QUOTED.fullmatch(text) else text
        registry.id(group, found)
    return found


def parse_choice(texts: Sequence[str], registry: FeatureRegistry) -> list[Feature]:
    """The features that the option names: ``group=name``, or several of a group by ``+``, separated by commas.

    Args:
        texts: the option's values; a value that is a feature's whole name is one, whatever it holds.
        registry: names that hold a comma, "+" or "=" are recognised by it without quotes, too.

    Raises:
        FeatureError: a part of another form, an unknown group or feature, or none at all.
    """
    found: list[Feature] = []
    for part in _parts(texts, registry):
        if "=" not in part and ":" in part:  # as it was written before
            part = part.replace(":", "=", 1)
        group, value = _divided(part, registry)
        whole = _alone(group, value, registry) is not None
        for piece in [value] if whole else _split(value, "+"):
            name = _name(group, piece.strip(), registry)
            found.append(registry.features[registry.id(group, name)])
    if not found:
        raise FeatureError("--features names no feature; write, e.g., language=swa,task=ner")
    return found


def parse_folders(texts: Sequence[str]) -> dict[str, Path]:
    """Folders by the name that their feature gets: ``name=FOLDER``; a name that holds "=" stands in quotes.

    Raises:
        ConfigError: an argument of another form, or a name given twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if (quotes := _QUOTED.match(text)) and text[quotes.end() :].startswith("="):
            name, folder = unquoted(quotes[0].strip()), text[quotes.end() + 1 :]
        if not equals or not name or not folder:
            raise ConfigError(f"{text!r} is not of the form name=FOLDER")
        if name in found:
            raise ConfigError(f"the name {name!r} is given twice")
        found[name] = Path(folder)
    return found
