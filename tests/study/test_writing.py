"""Files by task and language, the same bytes each time, that flix.data reads with held-out cells held out."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Literal

import pytest

from flix.data.errors import DataError
from flix.data.files import read_file
from flix.study.words import WordsData, load_words, read_words, write_words
from flix.study.words.__main__ import main
from tests.study.clones import make_clones


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, data: WordsData, clones: Path) -> Path:
    folder = tmp_path_factory.mktemp("written") / "words"
    assert write_words(data, folder, folder=clones, branches=True) == folder / "choosing.yaml"
    return folder


def rows_in(path: Path) -> list[dict[str, str]]:
    return [dict(record) for _, record in read_file(path)]


def test_a_file_for_each_split_of_each_cell(out: Path, data: WordsData):
    for cell in data.cells:
        for split in ("train", "dev", "test"):
            path = out / cell.task / f"{cell.language}.{split}.jsonl.gz"
            assert path.exists() == bool(cell.pairs(split)), path
            if path.exists():
                assert rows_in(path) == [data.row(cell.language, cell.task, p) for p in cell.pairs(split)]  # fmt: skip


def test_official_test_sets_lie_apart(out: Path):
    found = sorted(str(p.relative_to(out)) for p in out.glob("official/*/*"))
    assert found == [
        *(f"official/inflect/{c}.test.jsonl.gz" for c in ("dan", "deu", "eng", "fra", "spa")),
        "official/pron/fra.test.jsonl.gz",
        *(
            f"official/segment/{c}.test.jsonl.gz"
            for c in ("ces", "eng", "fra", "lat", "mon", "spa")
        ),
    ]
    assert set(rows_in(out / found[0])[0]) >= {"source", "target", "language", "task", "trained_on"}


def test_the_fingerprint_says_what_came_out(out: Path, data: WordsData):
    said = json.loads((out / "fingerprint.json").read_text(encoding="utf-8"))
    present = {str(p.relative_to(out).as_posix()) for p in out.rglob("*.jsonl.gz")}
    assert set(said["files"]) == present
    name = "pron/deu.train.jsonl.gz"
    text = gzip.decompress((out / name).read_bytes())
    assert said["files"][name] == {
        "rows": len(data.cell("pron", "deu").train),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    assert {c["cell"]: c["held_out"] for c in said["cells"]} == {c.name: c.held_out for c in data.cells}  # fmt: skip


def test_the_same_bytes_again_and_never_into_a_folder_that_holds_something(
    out: Path, data: WordsData, clones: Path, tmp_path: Path
):
    write_words(data, tmp_path, folder=clones, branches=True)
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(out)).read_bytes(), path
    with pytest.raises(DataError, match="not an empty folder"):
        write_words(data, tmp_path)


@pytest.mark.parametrize(("name", "half"), [("choosing", "tuning"), ("last_word", "test")])
def test_flix_train_reads_the_configuration_and_holds_cells_out(
    out: Path, data: WordsData, name: str, half: Literal["tuning", "test"], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):  # fmt: skip
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("pydantic")
    from flix.training.data import read_data
    from flix.training.reading import read_settings

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    settings = read_settings(out / f"{name}.yaml")
    mixture = read_data(settings).mixture
    trained = [c for c in data.cells if c.held_out is None]
    assert {tuple(sorted(cell.split(","))): size for cell, size in mixture.sizes.items()} == {
        (f"language={c.language}", f"task={c.task}"): len(c.train) for c in trained
    }
    rows = mixture.evaluation_rows()
    split: Literal["dev", "test"] = "dev" if half == "tuning" else "test"
    assert len(rows) == sum(len(c.pairs(split)) for c in data.cells)
    unseen = {rows.names[cell] for cell in rows.cells.tolist() if not rows.seen[cell]}
    assert {tuple(sorted(cell.split(","))) for cell in unseen} == {
        (f"language={c.language}", f"task={c.task}") for c in data.held_out(half)
    }
    assert set(mixture.registry().groups) == {"language", "task", "family", "shared", "branch"}
    assert settings.ranks.model_dump()["branch"] == 2


class TestReadingBack:
    """What is read is what was written, or refused."""

    def test_all_of_it(self, out: Path, data: WordsData):
        found = read_words(out)
        assert found.cells == data.cells and found.seed == data.seed
        assert found.families == data.families and found.branches == data.branches
        assert list(found.rows("train")) == list(data.rows("train"))
        assert found.fingerprint["repositories"] == data.fingerprint["repositories"]

    @pytest.fixture
    def small(self, data: WordsData, tmp_path: Path) -> Path:
        cell = data.cell("pron", "lat")
        some = WordsData((cell,), data.families, data.branches, fingerprint=data.fingerprint)
        return write_words(some, tmp_path / "small").parent

    def test_a_changed_or_missing_file_is_named(self, small: Path):
        path = small / "pron" / "lat.dev.jsonl.gz"
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"{}\n"))
        with pytest.raises(DataError, match=r"lat\.dev\.jsonl\.gz: not as it was written"):
            read_words(small)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DataError, match=r"lat\.dev\.jsonl\.gz: cannot be read"):
            read_words(small)
        path.unlink()
        with pytest.raises(DataError, match=r"lat\.dev\.jsonl\.gz: cannot be read"):
            read_words(small)

    def test_an_unfinished_folder_or_another_version_is_refused(self, small: Path):
        path = small / "fingerprint.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**said, "build": 0}), encoding="utf-8")
        with pytest.raises(DataError, match="written by build 0"):
            read_words(small)
        path.write_text("[]")
        with pytest.raises(DataError, match="no fingerprint"):
            read_words(small)
        path.unlink()
        with pytest.raises(DataError, match=r"cannot be read .*python -m flix\.study\.words"):
            read_words(small)


def test_the_command_writes_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = make_clones(tmp_path / "clones", ("deu", "eng"))
    common = [str(root), "--no-quickstart", "--language", "deu", "--language", "eng"]
    out = tmp_path / "out"
    assert main([*common, "--out", str(out), "--model", "some/base", "--commit", "wikipron=185dfcf"]) == 0  # fmt: skip
    captured = capsys.readouterr()
    data = load_words(root, languages=["deu", "eng"], quickstart=False)
    rows = sum(len(cell.train) for cell in data.cells)
    assert captured.out.startswith(f"2 languages, 7 tasks, {len(data.cells) - len(data.held_out())} trained cells, ")  # fmt: skip
    assert f"{rows:,} training rows" in captured.out
    said = json.loads((out / "fingerprint.json").read_text(encoding="utf-8"))
    assert said["repositories"]["wikipron"]["commit"] == "185dfcf"
    assert 'model: "some/base"' in (out / "choosing.yaml").read_text()
    assert "branch" not in (out / "choosing.yaml").read_text()
    assert main([*common, "--out", str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*common, "--out", str(tmp_path / "other"), "--commit", "wikipron"])
