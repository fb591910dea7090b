"""F1 of morphs against cases with a known answer."""

from __future__ import annotations

import pytest

from flix.study.evidence import EvidenceError
from flix.study.published import SEGMENTATION, morph_f1


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("a|b", "a|b")], 100.0),
        ([("ab", "a|b")], 0.0),
        ([("a|c", "a|b")], 50.0),
        ([("a|b", "a|b"), ("abc", "a|b|c")], 100 * 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5)),
        ([("a|a", "a|b")], 100 * 2 * 1.0 * 1.0 / 2),  # as the task counts: each that is answered is looked up
    ],
)  # fmt: skip
def test_f1_of_morphs(pairs: list[tuple[str, str]], expected: float) -> None:
    assert morph_f1(pairs) == pytest.approx(expected)


def test_no_word_has_no_f1() -> None:
    with pytest.raises(EvidenceError, match="at least one word"):
        morph_f1([])


def test_every_system_has_every_language() -> None:
    languages = {frozenset(of) for of in SEGMENTATION.values()}
    assert languages == {frozenset({"ces", "eng", "fra", "hun", "ita", "lat", "mon", "spa"})}
