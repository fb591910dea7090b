"""Runs' folders, made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import make_run

LANGUAGES = [
    "hau",
    "swa",
    "yor",
    "zul",
    "xho",
    "ibo",
    "amh",
    "orm",
    "som",
    "tir",
    "pcm",
    "eng",
    "fra",
    "por",
    "ara",
    "heb",
    "kin",
    "lug",
    "wol",
    "twi",
    "ewe",
    "fon",
    "bam",
    "mos",
    "nya",
    "sna",
    "tsn",
    "ven",
    "run",
    "lin",
]
TASKS = [
    "ner1",
    "ner2",
    "topic1",
    "topic2",
    "mt1",
    "mt2",
    "pos",
    "lemma",
    "gec",
    "sentiment",
    "xnli",
    "qa",
]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A small run."""
    return make_run(tmp_path / "run")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 languages and 12 tasks, with 48 layers."""
    held = [("lin", task) for task in TASKS[:6]] + [("ven", "qa"), ("hau", "mt1")]
    return make_run(
        tmp_path_factory.mktemp("large") / "large", LANGUAGES, TASKS, held_out=held, layers=48, size=64, samples=20,
        steps=3000,
    )  # fmt: skip
