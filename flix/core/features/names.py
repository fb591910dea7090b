"""How features and groups are named."""

from __future__ import annotations

from flix.core.errors import FeatureError

Feature = tuple[str, str]
"""A feature is named by its group and its own name: ``("language", "hau")``."""

EVERY = "*"
"""In ``implies``, ``(group, "*")`` stands for every feature of the group, later ones too."""


def check_group(group: object) -> None:
    """Refuse an ill-formed name of a group.

    Raises:
        FeatureError: it is.
    """
    if not isinstance(group, str) or not group or "." in group:
        raise FeatureError(
            f"a group's name is a non-empty string without '.', got {group!r} "
            "(the group ends at the first '.' in the names of an adapter's tensors)"
        )


def check_name(group: str, name: object) -> None:
    """Refuse an ill-formed name of a feature.

    Raises:
        FeatureError: it is.
    """
    if not isinstance(name, str) or not name or name == EVERY:
        raise FeatureError(
            f"a feature's name in group {group!r} is a non-empty string other than '*', "
            f"got {name!r}"
        )


def pair(feature: object) -> Feature:
    """A feature's name, from a pair in any form.

    Raises:
        FeatureError: no pair of strings.
    """
    if (
        isinstance(feature, list | tuple)
        and len(feature) == 2
        and all(isinstance(part, str) for part in feature)
    ):
        return (feature[0], feature[1])
    raise FeatureError(f"a feature is named as a pair (group, name), got {feature!r}")
