"""The base that was pretrained for a study, which its scores keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flix.study.evidence import EvidenceError, Study
from flix.study.tables import Table, count

PRETRAINING = "pretraining.json"


def with_base(folder: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """A study's scores with the record of its base, if the folder has one.

    Raises:
        EvidenceError: it is a dry run.
    """
    file = folder / PRETRAINING
    if not file.is_file():
        return dict(said)
    record = json.loads(file.read_bytes())
    if record.get("dry_run"):
        raise EvidenceError(f"{str(folder)!r} is a dry run, whose figures mean nothing")
    return {**said, "pretraining": record}


def base_table(study: Study) -> Table:
    """What the base of a study is, and how it was pretrained.

    Raises:
        EvidenceError: no base was pretrained for it.
    """
    said = study.made.get("pretraining")
    if not said:
        raise EvidenceError(f"no base was pretrained for the study {study.name!r}")
    shape = said["architecture"]
    layers = f"{shape['num_layers']} + {shape['num_decoder_layers']} layers, width {shape['d_model']}"  # fmt: skip
    row = (
        layers,
        count(said["parameters"]),
        count(said["words"]),
        str(len(said["languages"])),
        count(said["steps"]),
        f"{said['seconds']:,.0f}",
        count(said["tokens_a_second"]),
        f"{said['final_loss']:.3f}",
    )
    headings = ("base", "parameters", "words", "languages", "steps", "seconds", "tokens a second", "loss")  # fmt: skip
    return Table(headings, [row], f"Pretrained on {said['device']}, {said['precision']}.")
