"""The built data keeps its promises: splits, held-out cells, caps, sizes, determinism, cache."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from flix.quickstart.data import (
    Example,
    QuickstartData,
    cache,
    copy_baseline,
    default_cache_dir,
    load_data,
)
from flix.quickstart.data.build import build_cell
from flix.quickstart.data.design import (
    COPY_SHARE,
    DEV_ITEMS,
    MAX_BYTES,
    SMALLEST_TRAIN,
    TASKS,
    TEST_ITEMS,
)

SPLITS = ("train", "dev", "test")


def test_scope(data: QuickstartData) -> None:
    assert len(data.languages) >= 14
    assert len(data.tasks) == 7
    assert data.families == ("word", "number", "date", "name")
    assert len(data.cells) >= 80
    assert {cell.language for cell in data.cells} == set(data.languages)
    assert {cell.task for cell in data.cells} == set(data.tasks)


def test_held_out_cells(data: QuickstartData) -> None:
    held_out = list(data.zero_shot())
    assert len(held_out) >= 12
    halves = [len(list(data.zero_shot("tuning"))), len(list(data.zero_shot("test")))]
    assert sum(halves) == len(held_out)
    assert min(halves) >= 6
    trained = list(data.trained())
    for cell in held_out:
        assert cell.train == []
        assert any(other.language == cell.language for other in trained), cell.name
        assert any(other.task == cell.task for other in trained), cell.name
    assert all(cell.train for cell in trained)
    for half in ("tuning", "test"):
        assert {cell.task for cell in data.zero_shot(half)} == set(data.tasks)


def test_sizes_are_unequal(data: QuickstartData) -> None:
    sizes = [len(cell.train) for cell in data.trained()]
    assert min(sizes) >= SMALLEST_TRAIN
    assert max(sizes) > 3000
    assert max(len(cell.train) for cell in data.cells if cell.low_resource) < 300
    assert len({cell.language for cell in data.cells if cell.low_resource}) >= 4
    for cell in data.cells:
        assert (len(cell.dev), len(cell.test)) == (DEV_ITEMS, TEST_ITEMS), cell.name


def test_examples(data: QuickstartData) -> None:
    for cell in data.cells:
        tag = TASKS[cell.task].tag
        for part in SPLITS:
            for example in getattr(cell, part):
                assert example.source == f"{tag}: {example.text}"
                assert 0 < len(example.text.encode()) <= MAX_BYTES
                assert 0 < len(example.target.encode()) <= MAX_BYTES


def test_no_input_is_in_two_splits_of_its_task(data: QuickstartData) -> None:
    """Not even in two languages, but for words of the lemma task, which is split by lemma."""
    for task in data.tasks:
        places: dict[object, set[str]] = defaultdict(set)
        for cell in data.cells:
            for part in SPLITS if cell.task == task else ():
                for example in getattr(cell, part):
                    key = example.target if task == "lemma" else example.text
                    places[key.casefold()].add(part)
                    if task == "lemma":
                        places[cell.language, example.text].add(part)
        assert all(len(parts) == 1 for parts in places.values()), task


@pytest.mark.parametrize("family", ["number", "date"])
def test_numbers_and_dates_share_their_split_across_tasks(
    data: QuickstartData, family: str
) -> None:
    places: dict[tuple[str, str], set[str]] = defaultdict(set)
    answers: dict[str, set[str]] = defaultdict(set)
    for cell in data.cells:
        if data.family_of_task[cell.task] == family:
            for part in SPLITS:
                for example in getattr(cell, part):
                    places[cell.language, example.text].add(part)
                    answers[example.target].add(part)
    assert all(len(parts) == 1 for parts in places.values())
    # the English date without its weekday names the same day in every language
    assert all(len(parts) == 1 for parts in answers.values())


def test_inputs_are_unique_within_a_cell(data: QuickstartData) -> None:
    for cell in data.cells:
        texts = [example.text for part in SPLITS for example in getattr(cell, part)]
        assert len(texts) == len(set(texts)), cell.name


def test_copies_are_capped(data: QuickstartData) -> None:
    for cell in data.cells:
        for part in SPLITS:
            if examples := getattr(cell, part):
                assert copy_baseline(examples) <= 100 * COPY_SHARE, (cell.name, part)
    assert copy_baseline(example for cell in data.cells for example in cell.test) < 5


def test_copy_baseline() -> None:
    pair = [Example("lemma: a", "a"), Example("lemma: b: c", "c")]
    assert copy_baseline(pair) == 50
    assert pair[1].text == "b: c"
    assert np.isnan(copy_baseline([]))


def test_deterministic_and_seeded(data: QuickstartData) -> None:
    for language, task in (("id", "lemma"), ("lt", "num2en"), ("ka", "date2iso"), ("cy", "lemma")):
        assert build_cell(language, task, 0) == data.cell(language, task)
    other, first = build_cell("lt", "num2en", 1), data.cell("lt", "num2en")
    assert other is not None
    assert other.test != first.test


def test_cache(
    data: QuickstartData, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = list(cache_dir.iterdir())
    assert folders == [data.folder]
    calls: list[str] = []
    again = load_data(cache_dir, progress=lambda label, done, total: calls.append(label))
    assert again == data
    assert calls == []
    monkeypatch.setattr(cache, "package_versions", lambda: {"simplemma": "0"})
    assert cache.cache_folder(cache_dir, 0) != folders[0]


def test_a_cell_is_a_file_of_rows_for_each_split(data: QuickstartData) -> None:
    cell = data.cell("de", "num2dig")
    for split in SPLITS:
        lines = cache.file_of(data.folder, "num2dig", "de", split).read_bytes().splitlines()
        rows = [Example(**json.loads(line)) for line in lines]
        assert rows == getattr(cell, split)
    held_out = next(data.zero_shot())
    assert not cache.file_of(data.folder, held_out.task, held_out.language, "train").exists()


@pytest.mark.parametrize("file", ["index.json", "lemma/ka.train.jsonl"])
def test_a_damaged_cache_is_built_again(data: QuickstartData, tmp_path: Path, file: str) -> None:
    kept = [cell for cell in data.cells if cell.language == "ka"]
    folder = tmp_path / "kept"
    cache.write_cells(folder, kept)
    assert cache.read_cells(folder) == kept
    damaged = folder / file
    whole = damaged.read_bytes()
    for content in (whole[: len(whole) // 2], whole.rsplit(b"\n", 2)[0], b"", b"[]\n", b"\xff"):
        damaged.write_bytes(content)
        assert cache.read_cells(folder) is None
    damaged.unlink()
    assert cache.read_cells(folder) is None
    cache.write_cells(folder, kept)
    assert cache.read_cells(folder) == kept


def test_cache_is_written_whole_or_not_at_all(
    data: QuickstartData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(cache, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.write_cells(tmp_path / "x", list(data.cells[:1]))
    assert not (tmp_path / "x").exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLIX_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("FLIX_CACHE")
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "flix"


def test_unknown_cell_is_named(data: QuickstartData) -> None:
    with pytest.raises(KeyError, match="sw/hyphen"):
        data.cell("sw", "hyphen")
