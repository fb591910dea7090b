"""The study's own tables keep what docs/study.md promises."""

from __future__ import annotations

from collections import Counter

import pytest

from flix.study.words.design import (
    HELD_OUT,
    LANGUAGES,
    LOW_RESOURCE_BELOW,
    QUICKSTART_TASKS,
    TASKS,
    train_size,
)


def has(task: str, language: str) -> bool:
    info = LANGUAGES[language]
    return {
        "inflect": bool(info.inflection),
        "lemma": bool(info.inflection),
        "tags": bool(info.inflection),
        "segment": info.segmentation,
        "pron": bool(info.pronunciation),
        "spell": bool(info.pronunciation),
        "accent": info.accents,
        "denoise": False,
    }[task]


def test_many_languages_scripts_and_sizes():
    assert len(LANGUAGES) >= 30
    scripts = {info.script for info in LANGUAGES.values()}
    assert scripts >= {"Latn", "Cyrl", "Grek", "Geor", "Armn", "Hebr", "Deva", "Jpan", "Arab"}
    shares = [info.share for info in LANGUAGES.values()]
    assert max(shares) == 1 and min(shares) < 0.03
    assert sum(share < LOW_RESOURCE_BELOW for share in shares) >= 12
    assert not set(TASKS) & set(QUICKSTART_TASKS)


def test_held_out_cells_exist_and_leave_enough():
    assert all(has(task, language) for task, language in HELD_OUT)
    trained = [(t, c) for t in TASKS for c in LANGUAGES if has(t, c) and (t, c) not in HELD_OUT]
    assert min(Counter(language for _, language in trained).values()) >= 2
    assert {language for _, language in trained} == set(LANGUAGES)
    tasks = Counter(task for task, _ in trained)
    assert set(tasks) == set(TASKS) - {"denoise"} and min(tasks.values()) >= 5


@pytest.mark.parametrize("half", ["tuning", "test"])
def test_each_half_has_every_task(half: str):
    tasks = Counter(task for (task, _), which in HELD_OUT.items() if which == half)
    assert set(tasks) == set(TASKS) - {"denoise"}
    assert sum(tasks.values()) >= 13


def test_sizes_follow_task_language_and_seed_alone():
    assert train_size(0, "inflect", "deu") == train_size(0, "inflect", "deu")
    assert train_size(0, "inflect", "deu") != train_size(1, "inflect", "deu")
    assert train_size(0, "inflect", "deu") > 20 * train_size(0, "inflect", "kat")
    assert min(train_size(0, task, language) for task in TASKS for language in LANGUAGES) >= 30
