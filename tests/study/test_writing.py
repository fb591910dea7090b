"""Files by task and language, the same bytes each time, that flix.data reads with held-out cells held out."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from flix.data.errors import DataError
from flix.data.files import find_files, read_file
from flix.study.words import WordsData, load_words, write_words
from flix.study.words.__main__ import main
from tests.study.clones import make_clones

yaml = pytest.importorskip("yaml")


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
def test_the_configuration_trains_on_no_held_out_cell_and_evaluates_one_half(
    out: Path, data: WordsData, name: str, half: str
):
    datasets = pytest.importorskip("datasets")
    from flix.data import Mixture, Source

    said = yaml.safe_load((out / f"{name}.yaml").read_text(encoding="utf-8"))
    assert {(c["task"], c["language"]) for c in said["held_out"]} == {
        (c.task, c.language) for c in data.held_out(half)
    }  # type: ignore[arg-type]
    sources, evaluation = [], []
    for dataset in said["datasets"]:
        for key, into in (("files", sources), ("eval_files", evaluation)):
            for found in find_files(dataset[key], out):
                rows = datasets.Dataset.from_list(rows_in(found.path)).select_columns(["source", "target"])  # fmt: skip
                into.append(Source(rows, features={**dataset["features"], **found.features}))
    implies = {tuple(k.split("=")): [tuple(v.split("=")) for v in of] for k, of in said["implies"].items()}  # fmt: skip
    mixture = Mixture(sources, held_out=said["held_out"], evaluation=evaluation, implies=implies)
    trained = [c for c in data.cells if c.held_out is None]
    assert mixture.sizes == {f"language={c.language},task={c.task}": len(c.train) for c in trained}
    assert len(mixture.held_out_cells) == len(data.held_out(half))  # type: ignore[arg-type]
    registry = mixture.registry()
    assert set(registry.groups) == {"language", "task", "family", "shared", "branch"}


def test_flix_train_takes_the_configuration(out: Path):
    pytest.importorskip("pydantic")
    from flix.training.settings import Settings

    for name in ("choosing", "last_word"):
        settings = Settings.model_validate(yaml.safe_load((out / f"{name}.yaml").read_text()))
        assert settings.ranks.model_dump()["branch"] == 2


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
