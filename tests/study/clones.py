"""Tiny clones of the four repositories, in their layouts, and a small quickstart: all words are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from flix.study.words.design import LANGUAGES, PRONUNCIATION_TEST, QUICKSTART_TASKS
from flix.study.words.reading import REPOSITORIES

#: Enough that every task is trained somewhere and some cells are held out in each half.
SOME = ("ces", "dan", "deu", "eng", "fra", "lat", "mon", "spa")
_ONSETS, _VOWELS = "bdfgklmnprst", "éíouáy"
TAGS = ("N;NOM(SG)", "N;NOM(PL)", "V;IND;PST", "V;IND;FUT")
ENDINGS = ("", "en", "ol", "ift")


def made_up(start: int, count: int) -> list[str]:
    """Different words, numbers ``start`` to ``start + count - 1`` of a fixed order; most have accents."""
    words = []
    for number in range(start, start + count):
        word = ""
        for _ in range(4):
            number, vowel = divmod(number, len(_VOWELS))
            number, onset = divmod(number, len(_ONSETS))
            word += _ONSETS[(onset + len(word)) % len(_ONSETS)] + _VOWELS[(vowel + len(word)) % 6]
        words.append(word)
    return words


def inflected(lemmas: list[str]) -> list[str]:
    """Lines of the inflection task."""
    return [
        f"{lemma}\t{tags}\t{lemma}{ending}"
        for lemma in lemmas
        for tags, ending in zip(TAGS, ENDINGS, strict=True)
    ]


def segmented(words: list[str]) -> list[str]:
    """Lines of the segmentation task."""
    return [f"{word}\t{word[:4]} @@{word[4:]}\t010" for word in words]


def spoken(words: list[str]) -> list[str]:
    """Lines of WikiPron."""
    return [f"{word}\t{' '.join(word.replace('é', 'ɛ').upper())}" for word in words]


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def folder_of(root: Path, name: str) -> Path:
    """Where a repository's files are."""
    return root / REPOSITORIES[name].folder / REPOSITORIES[name].data


def make_clones(root: Path, languages: tuple[str, ...] = SOME) -> Path:
    """Clones with every file that the study wants of some languages; words are shared between the repositories."""
    for repository in REPOSITORIES.values():
        (root / repository.folder / repository.data).mkdir(parents=True)
    lemmas, others = made_up(0, 60), made_up(500, 340)
    for language in languages:
        info = LANGUAGES[language]
        if info.inflection:
            parts = {"trn": lemmas[:36], "dev": lemmas[36:48], "tst": lemmas[48:]}
            for ending, some in parts.items():
                path = folder_of(root, "inflection") / f"{info.inflection}.{ending}"
                write_lines(path, inflected(some))
        if info.segmentation:
            parts = {"train": others[:160], "dev": others[160:290], "test.gold": others[290:]}
            for number, (ending, some) in enumerate(parts.items()):
                # forms of the inflection task, too, whatever split it has them in, and a word of all three files
                some = [*some, *(f"{lemma}ol" for lemma in lemmas[number::6]), "twice"]
                some += [f"{lemmas[0]}ol"] if number else []  # the inflection task trains on it
                path = folder_of(root, "segmentation") / f"{language}.word.{ending}.tsv"
                write_lines(path, segmented(some))
        if info.pronunciation:
            words = [*others, *lemmas, *(f"{lemma}en" for lemma in lemmas), "zwölf"]
            write_lines(folder_of(root, "pronunciation") / f"{info.pronunciation}.tsv", spoken(words))  # fmt: skip
        if language in PRONUNCIATION_TEST:
            # the second half of these are words that the inflection task trains on; the last is in no other file
            words = [*others[:20], *lemmas[:20], "nowhere"]
            path = (
                folder_of(root, "pronunciation test") / f"{PRONUNCIATION_TEST[language]}_test.tsv"
            )
            write_lines(path, spoken(words))
    return root


def small_quickstart() -> SimpleNamespace:
    """What ``flix.quickstart.data.load_data`` gives, in small: German, Czech and English's neighbour French."""

    def some(task: str, split: str, count: int) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(text=f"{task} {split} {number}", target=f"{number} {split}")
            for number in range(count)
        ]

    cells = []
    for language in ("de", "cs", "fr", "xx"):
        for task in (*QUICKSTART_TASKS, "hyphen"):
            half = "test" if (language, task) == ("cs", "num2dig") else None
            train = [] if half else some(task, "train", 30)
            cell = SimpleNamespace(
                language=language, task=task, train=train, dev=some(task, "dev", 12),
                test=some(task, "test", 14), held_out=half, low_resource=False,
            )  # fmt: skip
            if (language, task) == ("de", "num2dig"):
                cell.test.append(SimpleNamespace(text="zwölf", target="12"))
            cells.append(cell)
    families = {task: task.partition("2")[0].rstrip("m") for task in QUICKSTART_TASKS}
    return SimpleNamespace(
        cells=cells, family_of_task={**families, "hyphen": "word"}, sources={"babel": "2.16"}
    )
