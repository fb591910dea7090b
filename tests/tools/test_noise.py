"""The denoising pairs."""

from __future__ import annotations

import numpy as np

from tools import noise, tokens

LISTS = {"de": ["Haus", "über", "grün", "lesen"], "ka": ["დედა", "სახლი"]}


def _fill_in(source: list[int], target: list[int]) -> list[int]:
    """Put what span corruption took out back in its place."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= tokens.FIRST_SENTINEL:
            spans[token] = []
            current = spans[token]
        else:
            current.append(token)
    return [part for token in source[:-1] for part in spans.get(token, [token])]


def test_span_corruption_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    sampler = noise.LineSampler(LISTS, {}, rng)
    for _ in range(300):
        line = sampler.line()
        assert 0 < len(line.encode()) <= noise.MAX_LINE_BYTES
        source, target = noise.corrupt_spans(line, rng)
        assert max(source + target) < tokens.VOCABULARY
        assert len(target) > 2
        assert tokens.decode([_fill_in(source, target)]) == [line]


def test_repair_targets_are_the_clean_line() -> None:
    rng = np.random.default_rng(1)
    changed = 0
    for _ in range(300):
        source, target = noise.denoising_pair("Haus über lesen", rng, span_share=0.0)
        assert tokens.decode([target]) == ["Haus über lesen"]
        changed += source[-len(target) :] != target
    assert changed > 200
