"""Which words a row shows, by task: the tests' own reading of what a pair says."""

from __future__ import annotations

from collections import defaultdict

from flix.study.words import WordsData


def words_shown(task: str, source: str, target: str) -> list[str]:
    if task == "inflect":
        return [source.rsplit(" ", 1)[0], target]
    if task == "lemma":
        return [source, target]
    if task == "tags":
        return source.split(" < ")
    if task == "denoise":
        return target.split()
    return [target if task in ("spell", "accent") else source]


def words_by_split(data: WordsData) -> dict[str, dict[str, set[str]]]:
    """By language and split, the words that any task shows, casefolded."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for split in ("train", "dev", "test"):
        for row in data.rows(split):
            shown = words_shown(row["task"], row["source"], row["target"])
            found[row["language"]][split] |= {word.casefold() for word in shown}
    return found


def assert_disjoint(data: WordsData) -> None:
    """No word of a language is shown in two splits, whatever the tasks."""
    for language, words in words_by_split(data).items():
        assert words["train"] and words["test"], language
        for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
            assert not words[one] & words[other], (language, one, other)
