"""Words of 48 languages, with their forms, sounds, parts and names, as cells of a mixture.

::

    from flix.study.words import load_words
    data = load_words("clones")        # of 2023InflectionST, 2022SegmentationST and wikipron
    for cell in data.cells:
        print(cell.name, cell.held_out, len(cell.train))
    train = datasets.Dataset.from_list(list(data.rows("train")))

``python -m flix.study.words clones --out words`` writes them as files, with configurations of ``flix train``.
docs/study.md says what each task is, and how splits and held-out cells are made.
"""

from flix.study.words.design import HELD_OUT, LANGUAGES, QUICKSTART_TASKS, TASKS
from flix.study.words.loading import OFFICIAL, load_words, official_languages, official_rows
from flix.study.words.saved import read_words
from flix.study.words.types import Cell, Pair, WordsData
from flix.study.words.writing import write_words

__all__ = [
    "HELD_OUT",
    "LANGUAGES",
    "OFFICIAL",
    "QUICKSTART_TASKS",
    "TASKS",
    "Cell",
    "Pair",
    "WordsData",
    "load_words",
    "official_languages",
    "official_rows",
    "read_words",
    "write_words",
]
