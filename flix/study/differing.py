"""Finds out in what a finished run differs from the run that the study would make now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from flix.study.counting import Counted
from flix.study.plan import Run
from flix.study.reading import checked
from flix.study.working import folder_json
from flix.transformers import folders


def difference(run: Run, counted: Counted) -> str:
    """In what a finished run's settings or data differ from what they would be now; empty if in nothing."""
    text = (run.folder / folders.RESOLVED).read_text(encoding="utf-8")
    # Read again: what an earlier flix did not have yet gets its default.
    before, now = checked(yaml.safe_load(text), str(run.folder)).to_dict(), run.settings.to_dict()
    for key, was, value in flat(before, now):
        if was != value and key != "output":
            return f"{key} was {was!r} and is {value!r} now"
    said = folder_json(run.folder / folders.RUN)["data"]
    if [_half(part) for part in said] != [_half(part) for part in counted.files] or any(
        # Names are left out: a study's folder may have moved.
        folders.changed([{**file, "name": None} for file in was["files"]], part["files"])
        for was, part in zip(said, counted.files, strict=True)
    ):
        return "its data has other content than the files have now"
    return ""


def _half(part: Mapping[str, Any]) -> tuple[str, bool]:
    return part["name"], part["evaluation"]


def flat(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The values of two trees of settings, side by side, by the path of their keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in (*now, *(key for key in before if key not in now)):
            path = f"{place}.{key}" if place else str(key)
            yield from flat(before.get(key), now.get(key), path)
    else:
        yield place, before, now
