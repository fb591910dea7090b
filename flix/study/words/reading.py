"""Public repositories in their own layout: where their files are, and what their lines mean.

All text is converted to Unicode's NFC.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flix.core.errors import listed, near, shown
from flix.data.errors import DataError
from flix.study.words.design import LANGUAGES, PRONUNCIATION_TEST
from flix.study.words.types import SPLITS, Split


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the study.

    Attributes:
        folder: the name of a clone's folder.
        data: the data's place in it.
        address, licence: of the data.
        needed: whether the study needs it. The others are used if they are there.
    """

    folder: str
    data: str
    address: str
    licence: str
    needed: bool = True


REPOSITORIES: dict[str, Repository] = {
    "inflection": Repository(
        "2023InflectionST",
        "part1/data",
        "https://github.com/sigmorphon/2023InflectionST",
        "CC BY-SA 3.0 (UniMorph)",
    ),
    "segmentation": Repository(
        "2022SegmentationST",
        "data",
        "https://github.com/sigmorphon/2022SegmentationST",
        "CC BY-SA 3.0",
    ),
    "pronunciation": Repository(
        "wikipron",
        "data/scrape/tsv",
        "https://github.com/CUNY-CL/wikipron",
        "code Apache-2.0, data CC BY-SA (Wiktionary)",
    ),
    "pronunciation test": Repository(
        "2021-task1",
        "data",
        "https://github.com/sigmorphon/2021-task1",
        "code Apache-2.0, data CC BY-SA 3.0 (Wiktionary)",
        needed=False,
    ),
}

_INFLECTION = {"train": "trn", "dev": "dev", "test": "tst"}
_CATEGORIES = frozenset(f"{number:03b}" for number in range(8))
_SEGMENTATION = {"train": "word.train", "dev": "word.dev", "test": "word.test.gold"}


@dataclass(frozen=True)
class Files:
    """The files that exist for one language.

    Attributes:
        inflection, segmentation: by split.
        pronunciation: its file; None if the study uses none for this language, or if it is missing.
        pronunciation_test: the shared task's test set; None if it has none, or if there is no clone.
        missing: files that the study needs and the clones lack.
    """

    inflection: Mapping[Split, Path]
    segmentation: Mapping[Split, Path]
    pronunciation: Path | None
    pronunciation_test: Path | None = None
    missing: tuple[Path, ...] = ()

    def all(self) -> list[tuple[str, Path]]:
        """(repository, file) for each file."""
        found = [("inflection", path) for path in self.inflection.values()]
        found += [("segmentation", path) for path in self.segmentation.values()]
        single = {
            "pronunciation": self.pronunciation,
            "pronunciation test": self.pronunciation_test,
        }
        return found + [(name, path) for name, path in single.items() if path]


def find_repositories(folder: Path) -> dict[str, Path]:
    """The data folder of each repository. One that the study does not need may be missing.

    Args:
        folder: the folder that holds the clones.

    Raises:
        DataError: the folder or a clone is missing, or a clone has another layout.
    """
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder; name the one that holds the clones")
    present = sorted(p.name for p in folder.iterdir() if p.is_dir())
    found = {}
    for name, repository in REPOSITORIES.items():
        clone = folder / repository.folder
        if not clone.is_dir():
            if not repository.needed:
                continue
            raise DataError(
                f"{str(folder)!r} has no folder {repository.folder!r}{near(repository.folder, present)}; "
                f"clone {repository.address} into it (the study needs: "
                f"{listed(r.folder for r in REPOSITORIES.values() if r.needed)})"
            )
        found[name] = clone / repository.data
        if not found[name].is_dir():
            raise DataError(
                f"{str(clone)!r} has another layout than {repository.address}: no folder {repository.data!r}"
            )
    return found


def find_language(folders: Mapping[str, Path], language: str) -> Files:
    """The files of a language. Missing ones are listed and not refused."""
    info = LANGUAGES[language]
    wanted: list[tuple[str, Split | None, Path]] = []
    if info.inflection:
        wanted += [("inflection", s, folders["inflection"] / f"{info.inflection}.{_INFLECTION[s]}") for s in SPLITS]  # fmt: skip
    if info.segmentation:
        wanted += [("segmentation", s, folders["segmentation"] / f"{language}.{_SEGMENTATION[s]}.tsv") for s in SPLITS]  # fmt: skip
    if info.pronunciation:
        wanted += [("pronunciation", None, folders["pronunciation"] / f"{info.pronunciation}.tsv")]
    if language in PRONUNCIATION_TEST and "pronunciation test" in folders:
        path = folders["pronunciation test"] / f"{PRONUNCIATION_TEST[language]}_test.tsv"
        wanted += [("pronunciation test", None, path)]
    there = [(name, split, path) for name, split, path in wanted if path.is_file()]
    return Files(
        {split: path for name, split, path in there if name == "inflection" and split},
        {split: path for name, split, path in there if name == "segmentation" and split},
        next((path for name, _, path in there if name == "pronunciation"), None),
        next((path for name, _, path in there if name == "pronunciation test"), None),
        tuple(path for _, _, path in wanted if not path.is_file()),
    )


def read_inflection(path: Path) -> Iterator[tuple[str, str, str]]:
    """(lemma, tags, form) of each line.

    Raises:
        DataError: a file that cannot be read, or a malformed line; file and line are named.
    """
    for where, fields in _lines(path):
        if len(fields) != 3:
            raise _malformed(where, "lemma TAB tags TAB form", fields)
        yield fields[0], fields[1], fields[2]


def read_segmentation(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(word, its morphs) of each line. Some files also have a category, which is ignored.

    A few words have an empty first morph, or one that begins with ``@@``. Morphs are returned as they are.

    Raises:
        DataError: as :func:`read_inflection`.
    """
    for where, fields in _lines(path):
        if len(fields) not in (2, 3) or not set(fields[2:]) <= _CATEGORIES:
            raise _malformed(where, "word TAB morph @@morph @@morph [TAB category]", fields)
        yield fields[0], tuple(fields[1].split(" @@"))


def read_pronunciations(path: Path) -> Iterator[tuple[str, str]]:
    """(word, pronunciation in IPA without blanks) of each line.

    Raises:
        DataError: as :func:`read_inflection`.
    """
    for where, fields in _lines(path):
        if len(fields) != 2:
            raise _malformed(where, "word TAB pronunciation", fields)
        yield fields[0], "".join(fields[1].split())


def _malformed(where: str, form: str, fields: list[str]) -> DataError:
    return DataError(f"{where}: a line is {form}, got {shown(chr(9).join(fields), 80)}")


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(``file:line``, fields) of each line, in NFC; blank lines are skipped."""
    try:
        with open(path, "rb") as opened:
            for number, raw in enumerate(opened, start=1):
                where = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: not UTF-8 text ({error.reason})") from None
                if not line.strip():
                    continue
                fields = unicodedata.normalize("NFC", line).split("\t")
                if not all(field.strip() for field in fields):
                    raise DataError(f"{where}: an empty field: {shown(line, 80)}")
                yield where, fields
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def describe(path: Path) -> dict[str, object]:
    """A file's name, bytes, lines and SHA-256.

    Raises:
        DataError: it cannot be read.
    """
    digest, size, lines = hashlib.sha256(), 0, 0
    try:
        with open(path, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
                size += len(block)
                lines += block.count(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return {"name": path.name, "bytes": size, "lines": lines, "sha256": digest.hexdigest()}


def commit_of(clone: Path) -> str | None:
    """The commit of a clone, from its ``.git``; None if that cannot be read."""
    git = clone / ".git"
    try:
        if git.is_file():  # a worktree or a submodule
            git = clone / git.read_text(encoding="utf-8").partition("gitdir:")[2].strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head or None
        name = head.partition(":")[2].strip()
        common = git / "commondir"
        root = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        for place in (git, root):
            if (place / name).is_file():
                return (place / name).read_text(encoding="utf-8").strip() or None
        for line in (root / "packed-refs").read_text(encoding="utf-8").splitlines():
            commit, _, packed = line.partition(" ")
            if packed == name:
                return commit
    except (OSError, UnicodeDecodeError):
        pass
    return None
