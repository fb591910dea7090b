"""Clones in their layouts; what is missing or malformed is said by name, with file and line."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest

from flix.data.errors import DataError
from flix.study.words.reading import (
    commit_of,
    describe,
    find_language,
    find_repositories,
    read_inflection,
    read_pronunciations,
    read_segmentation,
)
from tests.study.clones import folder_of, make_clones

READERS = {
    "inflection": read_inflection,
    "segmentation": read_segmentation,
    "pronunciation": read_pronunciations,
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_of_each_repository(tmp_path: Path):
    file = write(tmp_path / "a", "gehen\tV;PST\tging\n\nsein\tV;PST\twar\n")
    assert list(read_inflection(file)) == [("gehen", "V;PST", "ging"), ("sein", "V;PST", "war")]
    file = write(tmp_path / "b", "walkers\twalk @@er @@s\t110\nabych\taby @@ch\nEast\tEast Indies @@ian\n")  # fmt: skip
    assert list(read_segmentation(file)) == [
        ("walkers", ("walk", "er", "s")),
        ("abych", ("aby", "ch")),
        ("East", ("East Indies", "ian")),
    ]
    file = write(tmp_path / "c", "Tür\tt yː ɐ̯")
    assert list(read_pronunciations(file)) == [("Tür", "tyːɐ̯")]


def test_text_is_brought_to_nfc_and_windows_marks_are_passed_over(tmp_path: Path):
    decomposed = unicodedata.normalize("NFD", "été")
    file = write(tmp_path / "a", f"\ufeff{decomposed}\te t e\r\n{decomposed}\te\r\n".encode())
    assert list(read_pronunciations(file)) == [("été", "ete"), ("été", "e")]


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("inflection", "gehen\tging", "lemma TAB tags TAB form"),
        ("inflection", "gehen\tV\tging\tgang", "lemma TAB tags TAB form"),
        ("segmentation", "walkers", "word TAB morph"),
        ("segmentation", "walkers\twalk @@ers\tverb", "word TAB morph"),
        ("pronunciation", "Tür\tt\ty", "word TAB pronunciation"),
        ("pronunciation", "Tür\t ", "an empty field"),
        ("inflection", "\tV\tging", "an empty field"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, name: str, line: str, said: str):
    good = {"inflection": "a\tV\tb", "segmentation": "ab\ta @@b", "pronunciation": "a\tb"}[name]
    file = write(tmp_path / "file.tsv", f"{good}\n{line}\n")
    with pytest.raises(DataError, match=rf"file\.tsv:2: .*{said}"):
        list(READERS[name](file))


def test_bytes_that_are_no_text_are_named(tmp_path: Path):
    file = write(tmp_path / "file.tsv", b"a\tb\nc\t\xff\n")
    with pytest.raises(DataError, match=r"file\.tsv:2: not UTF-8"):
        list(read_pronunciations(file))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_pronunciations(tmp_path / "none.tsv"))
    with pytest.raises(DataError, match="cannot be read"):
        describe(tmp_path / "none.tsv")


def test_a_missing_folder_clone_or_layout_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        find_repositories(tmp_path / "nowhere")
    root = make_clones(tmp_path / "clones", ())
    (root / "wikipron").rename(root / "wikipron-master")
    with pytest.raises(
        DataError,
        match=r"no folder 'wikipron' \(did you mean 'wikipron-master'\?\); clone https://",
    ):
        find_repositories(root)
    (root / "wikipron-master").rename(root / "wikipron")
    shutil.rmtree(root / "2023InflectionST" / "part1")
    with pytest.raises(
        DataError, match=r"another layout than .*2023InflectionST: no folder 'part1/data'"
    ):
        find_repositories(root)


def test_the_files_of_a_language_and_those_that_are_missing(tmp_path: Path):
    root = make_clones(tmp_path / "clones", ("spa",))
    folders = find_repositories(root)
    files = find_language(folders, "spa")
    assert list(files.inflection) == list(files.segmentation) == ["train", "dev", "test"]
    assert files.pronunciation is not None and not files.missing
    assert [name for name, _ in files.all()] == ["inflection"] * 3 + ["segmentation"] * 3 + ["pronunciation"]  # fmt: skip
    lost = folder_of(root, "segmentation") / "spa.word.train.tsv"
    lost.unlink()
    assert find_language(folders, "spa").missing == (lost,)
    assert len(find_language(folders, "deu").missing) == 4


def test_a_file_is_described(tmp_path: Path):
    file = write(tmp_path / "a.tsv", "x\ny\n")
    assert describe(file) == {
        "name": "a.tsv",
        "bytes": 4,
        "lines": 2,
        "sha256": "09834d488008f5f1ef589a2d7cedc52425bee9dd23b2212e4c1d673c5cbb54e4",
    }


class TestCommit:
    """As git writes it."""

    HASH = "e7f1b32" + "0" * 33

    def test_of_a_branch_of_its_own_file_or_packed(self, tmp_path: Path):
        git = tmp_path / ".git"
        (git / "refs" / "heads").mkdir(parents=True)
        write(git / "HEAD", "ref: refs/heads/main\n")
        write(git / "packed-refs", f"# pack-refs\n{'1' * 40} refs/heads/other\n{self.HASH} refs/heads/main\n")  # fmt: skip
        assert commit_of(tmp_path) == self.HASH
        write(git / "refs" / "heads" / "main", "2" * 40 + "\n")
        assert commit_of(tmp_path) == "2" * 40

    def test_of_no_branch(self, tmp_path: Path):
        (tmp_path / ".git").mkdir()
        write(tmp_path / ".git" / "HEAD", self.HASH + "\n")
        assert commit_of(tmp_path) == self.HASH

    def test_of_a_worktree(self, tmp_path: Path):
        main, tree = tmp_path / "main" / ".git", tmp_path / "tree"
        (main / "worktrees" / "tree").mkdir(parents=True)
        (main / "refs" / "heads").mkdir(parents=True)
        tree.mkdir()
        write(main / "worktrees" / "tree" / "HEAD", "ref: refs/heads/side\n")
        write(main / "worktrees" / "tree" / "commondir", "../..\n")
        write(main / "refs" / "heads" / "side", self.HASH + "\n")
        write(tree / ".git", f"gitdir: {main / 'worktrees' / 'tree'}\n")
        assert commit_of(tree) == self.HASH

    def test_of_none(self, tmp_path: Path):
        assert commit_of(tmp_path) is None
