"""Settings that match nothing. They are allowed, since a configuration may serve several bases; people are told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from flix.core.config.config import FlixConfig
from flix.core.config.patterns import compiled
from flix.core.config.targets import Patterns, matches
from flix.core.errors import listed, near


def unused_exclusions(paths: Collection[str], excluded: Patterns) -> list[str]:
    """What to say of ``exclude_modules`` that exclude no layer.

    Args:
        paths: the layers of the base.
        excluded: the setting.
    """
    tails = {path.rsplit(".", 1)[-1] for path in paths}
    several = ([excluded] if excluded else []) if isinstance(excluded, str) else excluded
    return [
        f"exclude_modules: {one!r} matches no layer{near(one, tails)}"
        for one in several
        if not any(matches(path, one if isinstance(excluded, str) else [one]) for path in paths)
    ]


def unused_settings(config: FlixConfig, adapted: Iterable[str]) -> list[str]:
    """What to say of patterns that match no adapted layer, and of fallbacks that no group has.

    Args:
        config: the configuration.
        adapted: the layers that are adapted.
    """
    paths, notes = list(adapted), list[str]()
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name) or {}:
            fits = compiled(pattern, name, ending=True)
            if not any(fits(path) for path in paths):
                tails = {path.rsplit(".", 1)[-1] for path in paths}
                notes.append(f"{name}: {pattern!r} matches no adapted layer{near(pattern, tails)}")
    known = {name for _, name in config.registry.live}
    for name, given in config.unknown.items() if isinstance(config.unknown, Mapping) else ():
        fallbacks = [given] if isinstance(given, str) else given
        if lost := [one for one in fallbacks if one not in known]:
            notes.append(
                f"unknown: no group has a feature {listed(map(repr, lost))}, which stands for {name!r}{near(lost[0], known)}"
            )
    return notes
