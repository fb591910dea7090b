"""How features and groups are named (docs/specification.md §2.2).

Names are kept in Unicode's NFC, so that one text is one name however it was typed. What cannot be seen is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence

from flix.core.errors import FeatureError, listed, shown, warn

Feature = tuple[str, str]
"""A feature is named by its group and its own name: ``("language", "hau")``."""

EVERY = "*"
"""In ``implies``, ``(group, "*")`` stands for every feature of the group, later ones too."""

LONGEST = 1000
"""A name's most characters: what is done to a name may cost the square of its length."""

_UNSEEN = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")  # controls, formats, surrogates, unassigned, breaks
# Letters, marks and symbols that show nothing either: Unicode's default ignorables, and the blank Braille pattern.
_BLANK = re.compile(
    "[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u2800\\u3164\\ufe00-\\ufe0f\\uffa0\\U000e0000-\\U000e0fff]"
)


def normal_group(group: object) -> str:
    """A group's name as it is kept.

    Raises:
        FeatureError: an ill-formed one.
    """
    if not isinstance(group, str) or not group or "." in group:
        raise FeatureError(
            f"a group's name is a non-empty string without '.', got {shown(group)} "
            "(the group ends at the first '.' in the names of an adapter's tensors)"
        )
    return normal(group, "a group")


def normal_name(group: str, name: object) -> str:
    """A feature's name as it is kept.

    Raises:
        FeatureError: an ill-formed one.
    """
    if not isinstance(name, str) or not name or name == EVERY:
        raise FeatureError(
            f"a feature's name in group {group!r} is a non-empty string other than '*', "
            f"got {shown(name)}"
        )
    return normal(name, f"a feature of group {group!r}")


def normal(text: str, what: str) -> str:
    """A name in NFC.

    Args:
        text: the name.
        what: whose it is, for the message.

    Raises:
        FeatureError: it begins or ends with a blank, or holds a character that cannot be seen; or it is too long.
    """
    if len(text) > LONGEST:
        raise FeatureError(
            f"the name of {what} has {len(text)} characters, at most {LONGEST} are allowed: "
            f"{shown(text, 60)}"
        )
    if text.isascii() and text.isprintable():
        kept = str(text)
    else:
        for place, character in enumerate(text):
            if unicodedata.category(character) in _UNSEEN or _BLANK.match(character):
                raise FeatureError(
                    f"the name {shown(text)} of {what} holds {_described(character)} at place {place}; "
                    "control and invisible characters are refused in names"
                )
        kept = unicodedata.normalize("NFC", text)
    if kept != kept.strip():
        end = "begins" if kept[0].isspace() else "ends"
        blank = _described(kept[0] if kept[0].isspace() else kept[-1])
        raise FeatureError(
            f"the name {shown(text)} of {what} {end} with a blank, {blank}; leave it out"
        )
    return kept


def _described(character: str) -> str:
    name = unicodedata.name(character, "")
    if not name:
        kind = unicodedata.category(character)
        name = {"Cc": "a control character", "Cs": "half of a surrogate pair"}.get(
            kind, "unassigned"
        )
    return f"U+{ord(character):04X} ({name})"


def pair(feature: object) -> Feature:
    """A feature's name, from a pair in any form, as it is kept.

    Raises:
        FeatureError: no pair of strings, or an ill-formed name.
    """
    if (
        isinstance(feature, list | tuple)
        and len(feature) == 2
        and all(isinstance(part, str) for part in feature)
    ):
        group, name = feature
        group = normal_group(group)
        return (group, name if name == EVERY else normal_name(group, name))
    raise FeatureError(f"a feature is named as a pair (group, name), got {shown(feature)}")


def pairs(features: object, what: str) -> tuple[Feature, ...]:
    """Features' names, from pairs in any form, as they are kept.

    Raises:
        FeatureError: no list of pairs, or an ill-formed name; ``what`` says what the list is.
    """
    if isinstance(features, str) or not isinstance(features, Iterable):
        raise FeatureError(f"{what} must be a list of (group, feature), got {shown(features)}")
    return tuple(pair(feature) for feature in features)


def written(feature: Sequence[str]) -> str:
    """A feature as users write it and messages show it: ``language=hau``."""
    return "=".join(feature)


def folded(name: str) -> str:
    """A name without what is only case or compatibility: two names with the same one are hard to tell apart."""
    if name.isascii():
        return name.lower()
    for _ in range(2):  # folding case can undo the normal form
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return name


def alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that differ only in case or by compatibility, each later name with the first one."""
    first: dict[str, str] = {}
    for name in names:
        earlier = first.setdefault(folded(name), name)
        if earlier != name:
            yield earlier, name


def warn_alike(group: str | None, names: Iterable[str], new: Collection[str] | None = None) -> None:
    """Warn of names that differ only in case or by compatibility: most likely one of them is a slip.

    Args:
        group: the group that the names are of; None: they are groups themselves.
        names: as they are kept.
        new: warn only of pairs that one of these is in.
    """
    found = [
        f"{a!r} and {b!r}"
        for a, b in alike(dict.fromkeys(names))
        if new is None or a in new or b in new
    ]
    if found:
        where = "the groups" if group is None else f"group {group!r}:"
        each = "group" if group is None else "feature"
        warn(
            f"{where} {listed(found, 5)} differ only in case or by compatibility (NFKC); "
            f"each is a {each} of its own. Rename one if they are meant to be one"
        )
