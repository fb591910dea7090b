"""The two files that a folder of the study's data holds beside its rows, small."""

from __future__ import annotations

from pathlib import Path

#: Shipped studies that stand on these files alone.
ALONE = ("settle", "unseen", "languages", "ablations")
_TEXT = """\
model: google/byt5-small
kind: seq2seq
datasets:
  - files: "inflect/{language}.train.jsonl.gz"
    eval_files: "inflect/{language}.SPLIT.jsonl.gz"
    features: {task: inflect}
held_out: [{language: spa, task: inflect}]
implies: {"task=*": "shared=all"}
ranks: {rule: by_group, language: 1, task: 2, shared: 8}
"""


def placed(folder: Path) -> None:
    """Write them where shipped studies look: in ``words``, and for one data set of its own beside nothing."""
    for home in (folder, folder / "words"):
        home.mkdir(parents=True, exist_ok=True)
        for name, split in (("choosing", "dev"), ("last_word", "test")):
            (home / f"{name}.yaml").write_text(_TEXT.replace("SPLIT", split), encoding="utf-8")
