"""One set of clones and what the study makes of it, for all tests that only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from flix.study.words import WordsData, load_words
from flix.study.words.quickstart import borrowed
from tests.study.clones import SOME, make_clones, small_quickstart


@pytest.fixture(scope="session")
def clones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clones(tmp_path_factory.mktemp("clones"))


@pytest.fixture(scope="session")
def data(clones: Path) -> WordsData:
    quickstart = borrowed(small_quickstart())
    return load_words(clones, languages=SOME, quickstart=quickstart, denoise=True)
