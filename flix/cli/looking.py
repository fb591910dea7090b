"""A look at data: which files belong together, what their names and columns tell, what kind of task they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flix.core.errors import listed
from flix.core.features.cells import Cell, cell_of
from flix.core.files import is_same
from flix.data.errors import DataError
from flix.data.files import Found, find_files, groups_of, read_file

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HALVES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("dev", "valid", "validation", "eval"), "dev"),
}
_GENERIC = {"data", "dataset", "all", "rows", "text", "texts", "corpus"}
# Names of tasks that look like codes of languages.
_TASKS = {
    "ner",
    "pos",
    "mt",
    "qa",
    "nli",
    "sts",
    "cls",
    "asr",
    "gec",
    "sum",
    "srl",
    "dep",
    "tag",
    "mlm",
    "lm",
    "sa",
}
_CODE = re.compile(r"[a-z]{2,3}(?:[_-](?:[A-Z]{2}|[A-Z][a-z]{3}|\d{3}))*")
GROUPS = {
    "language": ("language", "lang", "locale", "lang_code", "language_code", "iso"),
    "task": ("task", "task_name"),
    "domain": ("domain", "genre"),
}
"""Groups, and the columns that are taken to name their features."""
_MOST_FEATURES, _LOOKED = 500, 2000


@dataclass(frozen=True)
class Files:
    """Files that are one data set.

    Attributes:
        pattern: as a configuration names them, from the current folder.
        evaluation: the pattern of the files to evaluate on; None where there are none.
        features: what their place and name tell of all of them: ``{"task": "ner"}``.
    """

    pattern: str
    evaluation: str | None
    features: Mapping[str, str]


@dataclass
class Column:
    """What a column holds, in the rows that were looked at.

    Attributes:
        forms: ``"text"``, ``"number"``, ``"texts"``, ``"messages"``, ``"nothing"`` or ``"other"``.
        values: the different texts and numbers, or entries of lists, up to some number.
        longest: the most characters of a text.
        count: how many rows have it.
        whole: whether all numbers are whole.
    """

    forms: set[str] = field(default_factory=set)
    values: dict[Any, int] = field(default_factory=dict)
    longest: int = 0
    count: int = 0
    whole: bool = True

    def add(self, value: Any) -> None:
        """Take a row's value into account."""
        self.count += 1
        form = _form(value)
        self.forms.add(form)
        if form == "text":
            self.longest = max(self.longest, len(value))
        if form == "number":
            self.whole = self.whole and float(value).is_integer()
        for entry in value if form == "texts" else [value] if form in ("text", "number") else ():
            if len(self.values) <= _MOST_FEATURES or entry in self.values:
                self.values[entry] = self.values.get(entry, 0) + 1

    def all(self, form: str) -> bool:
        """Whether all rows have this form; nothing counts as any."""
        return self.forms - {"nothing"} == {form}

    @property
    def few(self) -> bool:
        """Whether the values are few enough to be labels or features: each occurs twice on average."""
        total = sum(self.values.values())
        return len(self.values) <= _MOST_FEATURES and (total >= 2 * len(self.values) or total <= 4)


@dataclass(frozen=True)
class Looked:
    """What a look at a data set found.

    Attributes:
        files: its files.
        columns: of the rows that were looked at.
        feature_columns: groups whose feature stands in a column.
        cells: rows for training by cell.
        evaluation_cells: rows for evaluation by cell.
    """

    files: Files
    columns: Mapping[str, Column]
    feature_columns: Mapping[str, str]
    cells: Mapping[Cell, int]
    evaluation_cells: Mapping[Cell, int]

    @property
    def rows(self) -> int:
        """Rows for training."""
        return sum(self.cells.values())


def find_data(given: Sequence[str]) -> list[Files]:
    """The data sets that some files, folders and patterns are.

    Args:
        given: files; folders, whose data files are taken, those in folders below too; or patterns, in which
            ``{group}`` stands for a feature in a file's name.

    Raises:
        DataError: there is no such file, or a folder holds no data.
    """
    patterns = [text for text in given if groups_of(text) and not Path(text).exists()]
    found = [_of_pattern(pattern) for pattern in patterns]
    files: dict[Path, None] = {}
    for text in given:
        if text in patterns:
            continue
        if Path(text).is_dir():
            inside = [p for p in sorted(Path(text).rglob("*")) if p.is_file() and _ending(p)]
            if not inside:
                raise DataError(
                    f"the folder {text!r} holds no data: files that end with {', '.join(ENDINGS)}, or these and .gz"
                )
            files.update(dict.fromkeys(inside))
        else:
            files.update(dict.fromkeys(f.path for f in find_files(text, Path("."))))
    return found + _grouped(files)


def check_no_data(out: Path, found: Sequence[Files]) -> None:
    """Refuse a file to write that is one of those that are looked at.

    Raises:
        DataError: it is.
    """
    patterns = [text for one in found for text in (one.pattern, one.evaluation) if text]
    if out.exists() and any(is_same(out, file) for text in patterns for file in _matches(text)):
        raise DataError(f"--out: {str(out)!r} is one of the data files; name another file")


def _of_pattern(pattern: str) -> Files:
    find_files(pattern, Path("."))
    stem, half, _ = _divided(Path(pattern))
    evaluation = None
    if half == "train":
        for other in ("test", "dev"):
            for word in (w for w, h in _HALVES.items() if h == other):
                swapped = re.sub(rf"(?<![a-z])({'|'.join(w for w, h in _HALVES.items() if h == half)})(?![a-z])", word, pattern)  # fmt: skip
                if evaluation is None and _matches(swapped):
                    evaluation = swapped
    plain = [t for t in re.split(r"[._-]+", "_".join(stem)) if t and "{" not in t]
    known = groups_of(pattern)
    name = "_".join(plain) or Path(pattern).parent.name
    named = {} if "task" in known or not name or "{" in name else {"task": name}
    return Files(pattern, evaluation, named)


def _matches(pattern: str) -> list[Path]:
    try:
        return [found.path for found in find_files(pattern, Path("."))]
    except DataError:
        return []


def _ending(path: Path) -> str:
    name = path.name[:-3] if path.name.endswith(".gz") else path.name
    return next((end for end in ENDINGS if name.endswith(end)), "")


def _divided(path: Path) -> tuple[list[str], str, str]:
    """The tokens of a file's name but for the half and the ending; the half ("" where none is named); the ending."""
    ending = _ending(path)
    ending += ".gz" if path.name.endswith(".gz") else ""
    tokens = re.split(r"\.", path.name[: len(path.name) - len(ending)] if ending else path.name)
    tokens = [part for token in tokens for part in ([token] if _CODE.fullmatch(token) else re.split(r"[_-]", token))]  # fmt: skip
    halves = [_HALVES[t] for t in tokens if t in _HALVES]
    if not halves:
        halves = [_HALVES[p] for p in path.parent.parts[-1:] if p in _HALVES]
    return [t for t in tokens if t not in _HALVES and t], halves[0] if halves else "", ending


def _is_language(token: str) -> bool:
    return _CODE.fullmatch(token) is not None and token not in _TASKS | _GENERIC


def _grouped(files: Iterable[Path]) -> list[Files]:
    """Files by folder and by what their names share; a name's token that is a code of a language is one."""
    sets: dict[tuple[str, ...], dict[str, list[tuple[Path, str | None]]]] = {}
    for path in files:
        stem, half, ending = _divided(path)
        places = [i for i, token in enumerate(stem) if _is_language(token)]
        place = places[-1] if places else None
        rest = tuple(t for i, t in enumerate(stem) if i != place)
        folder = path.parent.parent if path.parent.name in _HALVES else path.parent
        key = (str(folder), ending, "language" if place is not None else "", *rest)
        language = stem[place] if place is not None else None
        sets.setdefault(key, {}).setdefault(half, []).append((path, language))
    found = []
    for (folder_, _, _, *others), halves in sets.items():
        training = halves.get("train") or halves.get("")
        if training is None:
            continue
        evaluation = halves.get("test") or halves.get("dev")
        words = [t for t in others if t not in _GENERIC]
        task = "_".join(words) or Path(folder_).resolve().name
        found += _as_patterns(training, evaluation, task)
    return found


def _as_patterns(
    training: list[tuple[Path, str | None]],
    evaluation: list[tuple[Path, str | None]] | None,
    task: str,
) -> list[Files]:
    """One data set with a pattern, if there is one for exactly these files; else one a file."""
    features = {"task": task}
    one, other = _pattern(training), _pattern(evaluation) if evaluation else None
    if one is not None and (other is not None or not evaluation):
        return [Files(one, other, features)]
    of = {language: str(path) for path, language in evaluation or ()}
    return [
        Files(str(path), of.get(language), {**({"language": language} if language else {}), **features})
        for path, language in training
    ]  # fmt: skip


def _pattern(files: list[tuple[Path, str | None]]) -> str | None:
    """The pattern that matches these files and no other; None if there is none."""
    if len(files) == 1 and files[0][1] is None:
        return str(files[0][0])
    patterns = set()
    for path, language in files:
        if language is None:
            return None
        name = re.sub(rf"(?<![A-Za-z]){re.escape(language)}(?![A-Za-z])", "{language}", path.name)
        patterns.add(str(path.parent / name))
    if len(patterns) != 1:
        return None
    pattern = patterns.pop()
    return pattern if sorted(_matches(pattern)) == sorted(path for path, _ in files) else None


def look(files: Files) -> Looked:
    """Read a data set's rows: its columns, and how many rows each cell has.

    Raises:
        DataError: a file that cannot be read or is damaged; the line is named.
    """
    columns: dict[str, Column] = {}
    training = find_files(files.pattern, Path("."))
    for found in training:
        for number, (_, record) in enumerate(read_file(found.path)):
            if number == _LOOKED:
                break
            for name, value in record.items():
                columns.setdefault(name, Column()).add(value)
    if len(training) == 1 and "language" in training[0].features and _telling(columns):
        # One file whose rows tell their languages: its name is no code of one.
        features = {**files.features, "task": training[0].path.name.partition(".")[0]}
        files = Files(str(training[0].path), files.evaluation, features)
        training = find_files(files.pattern, Path("."))
    named = {*files.features, *groups_of(files.pattern)}
    feature_columns = {}
    for group, spelt in GROUPS.items():
        telling = [n for n in spelt if n in columns and columns[n].all("text") and columns[n].few]
        if telling and (group not in named or group == "task"):
            feature_columns[group] = telling[0]
    kept = {g: name for g, name in files.features.items() if g not in feature_columns}
    files = Files(files.pattern, files.evaluation, kept)
    evaluation = find_files(files.evaluation, Path(".")) if files.evaluation else []
    return Looked(
        files,
        columns,
        feature_columns,
        _cells(files, training, feature_columns),
        _cells(files, evaluation, feature_columns),
    )


def _telling(columns: Mapping[str, Column]) -> bool:
    """Whether a column tells several languages."""
    return any(len(columns[n].values) > 1 for n in GROUPS["language"] if n in columns and columns[n].all("text"))  # fmt: skip


def _cells(
    files: Files, found: Sequence[Found], feature_columns: Mapping[str, str]
) -> dict[Cell, int]:
    counts: dict[Cell, int] = {}
    for file in found:
        said: dict[tuple[Any, ...], int] = {}
        for _, record in read_file(file.path):
            values = tuple(str(record.get(column)) for column in feature_columns.values())
            said[values] = said.get(values, 0) + 1
        for values, count in said.items():
            columns = dict(zip(feature_columns, values, strict=True))
            cell = cell_of({**file.features, **columns, **files.features})
            counts[cell] = counts.get(cell, 0) + count
    return counts


def relative(pattern: str, folder: Path) -> str:
    """A pattern as a configuration in a folder names it."""
    path = os.path.relpath(os.path.expanduser(pattern), folder)
    return Path(path).as_posix()


def _form(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    if isinstance(value, list) and value:
        if all(isinstance(v, str | int) and not isinstance(v, bool) for v in value):
            return "texts"
        if all(isinstance(v, dict) and {"role", "content"} <= set(v) for v in value):
            return "messages"
    return "nothing" if value == [] else "other"


def described(columns: Mapping[str, Column]) -> str:
    """Columns with their forms, for messages."""
    return listed(f"{name} ({'/'.join(sorted(c.forms))})" for name, c in columns.items())
