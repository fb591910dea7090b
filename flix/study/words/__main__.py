"""``python -m flix.study.words CLONES --out FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flix.core.errors import FlixError
from flix.quickstart.arms import BASE
from flix.study.words.loading import load_words
from flix.study.words.writing import write_words


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the clones and write the data. Returns 0, or 2 after one line on standard error if the user can mend it."""
    parser = argparse.ArgumentParser("python -m flix.study.words", description=__doc__)
    add = parser.add_argument
    add(
        "clones",
        help="the folder with the clones 2023InflectionST, 2022SegmentationST, wikipron; 2021-task1 if there",
    )
    add("--out", required=True, help="a new or empty folder to write into")
    add("--language", action="append", metavar="CODE", help="ISO 639-3; again for more (all)")
    add("--seed", type=int, default=0)
    add("--denoise", action="store_true", help="with cells of unlabelled text")
    add(
        "--complete",
        action="store_true",
        help="all rows of the repositories, none held out by the study",
    )
    add("--no-quickstart", action="store_true", help="without numbers, dates and names")
    add("--no-official", action="store_true", help="without the shared tasks' test sets")
    add("--allow-missing", action="store_true", help="leave out cells whose files are missing")
    add("--branches", action="store_true", help="features of language families in the YAML, too")
    add(
        "--model",
        default="google/byt5-small",
        help="the base model in the YAML (%(default)s); quickstart: the one that flix has with it",
    )
    add("--commit", action="append", metavar="CLONE=COMMIT", default=[], help="where .git is gone")
    given = parser.parse_args(arguments)
    try:
        commits = dict(_pair(text, parser) for text in given.commit)
        data = load_words(
            given.clones,
            seed=given.seed,
            languages=given.language,
            denoise=given.denoise,
            complete=given.complete,
            quickstart=not given.no_quickstart,
            allow_missing=given.allow_missing,
            commits=commits,
            progress=_tell,
        )
        folder = None if given.no_official else given.clones
        model = str(BASE) if given.model == "quickstart" else given.model
        path = write_words(data, given.out, folder=folder, model=model, branches=given.branches)
    except (FlixError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in ("missing", "too_short"):
        if data.fingerprint[name]:
            print(f"{name.replace('_', ' ')}: {', '.join(data.fingerprint[name])}", file=sys.stderr)
    rows = sum(len(cell.train) for cell in data.cells)
    held = len(data.held_out())
    print(
        f"{len(data.languages)} languages, {len(data.tasks)} tasks, {len(data.cells) - held} trained cells, "
        f"{held} held out, {rows:,} training rows; train with: flix train {path}"
    )
    return 0


def _pair(text: str, parser: argparse.ArgumentParser) -> tuple[str, str]:
    name, sign, commit = text.partition("=")
    if not (name and sign and commit):
        parser.error(f"--commit is CLONE=COMMIT, got {text!r}")
    return name, commit


def _tell(language: str, done: int, total: int) -> None:
    print(f"{done}/{total} {language}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
