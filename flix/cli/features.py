"""Reading ``--features language=hau,task=ner``, ``--features language:hau`` and ``name=FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flix.core.errors import ConfigError, FeatureError
from flix.core.features.encoding import Row
from flix.core.features.names import Feature
from flix.core.features.registry import FeatureRegistry


def parse_features(texts: Sequence[str], registry: FeatureRegistry) -> Row:
    """The row that the option spells out.

    ``group=name`` parts are separated by commas, several names of a group by ``+``, and ``name:0.5`` weights one.

    Args:
        texts: the option's values.
        registry: names that hold ``+`` or ``:`` are recognised by it.

    Raises:
        FeatureError: a part of another form, a group given twice, an unknown group or feature, or a weight that is
            no number.
    """
    row: dict[str, str | dict[str, float]] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        if not part:
            continue
        group, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not group or not value:
            raise FeatureError(f"--features: {part!r} is not of the form group=name")
        if group in row:
            raise FeatureError(
                f"--features: group {group!r} is given twice; join names with '+': {group}=a+b"
            )
        row[group] = _value(group, value, registry)
    if not row:
        raise FeatureError("--features names no feature; write, e.g., language=hau,task=ner")
    registry.encode([row])
    return row


def _value(group: str, text: str, registry: FeatureRegistry) -> str | dict[str, float]:
    if (group, text) in registry:
        return text
    weights: dict[str, float] = {}
    for piece in text.split("+"):
        name, colon, weight = piece.strip(), "", ""
        if (group, name) not in registry:
            name, colon, weight = piece.strip().rpartition(":")
            if not colon:
                name = weight
        registry.id(group, name)
        try:
            weights[name] = weights.get(name, 0.0) + (float(weight) if colon else 1.0)
        except ValueError:
            raise FeatureError(
                f"--features: the weight of {group}={name} must be a number, got {weight!r}"
            ) from None
    return weights


def parse_choice(texts: Sequence[str], registry: FeatureRegistry) -> list[Feature]:
    """The features that the option names: ``group:name``, separated by commas.

    Args:
        texts: the option's values; a value that is a feature's whole name is one, whatever it holds.
        registry: names that hold a comma are recognised by it.

    Raises:
        FeatureError: a part of another form, an unknown group or feature, or none at all.
    """
    found: list[Feature] = []
    for text in texts:
        for part in [text] if _split(text) in registry else text.split(","):
            if not part.strip():
                continue
            feature = _split(part)
            if not all(feature):
                raise FeatureError(f"--features: {part.strip()!r} is not of the form group:name")
            registry.id(*feature)
            found.append(feature)
    if not found:
        raise FeatureError("--features names no feature; write, e.g., language:swa,task:ner")
    return found


def _split(text: str) -> Feature:
    group, _, name = text.strip().partition(":")
    return (group.strip(), name.strip())


def parse_folders(texts: Sequence[str]) -> dict[str, Path]:
    """Folders by the name that their feature gets: ``name=FOLDER``.

    Raises:
        ConfigError: an argument of another form, or a name given twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise ConfigError(f"{text!r} is not of the form name=FOLDER")
        if name in found:
            raise ConfigError(f"the name {name!r} is given twice")
        found[name] = Path(folder)
    return found
