"""Settings that match nothing are named."""

from __future__ import annotations

import flix
from flix.core.config.unused import unused_exclusions, unused_settings

PATHS = ["layers.0.q", "layers.0.v", "layers.1.q", "head"]


def test_exclusions_that_match_nothing() -> None:
    assert unused_exclusions(PATHS, ["q", "0.v", "head"]) == []
    assert unused_exclusions(PATHS, ["q", "qq"]) == [
        "exclude_modules: 'qq' matches no layer (did you mean 'q'?)"
    ]
    assert unused_exclusions(PATHS, r".*\.1\..*") == [] == unused_exclusions(PATHS, "")
    assert unused_exclusions(PATHS, r".*\.7\..*") == [
        r"exclude_modules: '.*\\.7\\..*' matches no layer"
    ]


def test_patterns_and_fallbacks_that_match_nothing() -> None:
    def said(**more: object) -> list[str]:
        registry = flix.FeatureRegistry({"language": ["hau", "swa"]})
        return unused_settings(flix.FlixConfig(registry=registry, ranks=2, **more), PATHS[:3])

    assert (
        said() == [] == said(rank_pattern={"q": 3, r"layers\.\d\.v": 1}, alpha_pattern={"0.q": 2})
    )
    assert said(unknown={"zul": "swa", "fra": ["hau", "swa"]}) == [] == said(unknown="skip")
    assert said(rank_pattern={"q": 3, "nothing": 3}, alpha_pattern={"head": 1}) == [
        "rank_pattern: 'nothing' matches no adapted layer",
        "alpha_pattern: 'head' matches no adapted layer",
    ]
    assert said(unknown={"zul": ["swa", "hua"]}) == [
        "unknown: no group has a feature 'hua', which stands for 'zul' (did you mean 'hau'?)"
    ]
