"""``flix train`` on data that is streamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flix.cli.app import app
from tests.helpers.training import Write, ok, run, weights_of


def streamed(data: Path, **changes: Any) -> list[dict[str, Any]]:
    """The tests' data sets, each a language of one task, with the held-out one left out; one of them not streamed."""
    for task in ("ner", "pos", "rev"):
        shutil.copy(data / f"{task}.jsonl", data / f"{task}.test.jsonl")
    return [
        {
            "files": str(data / f"{task}.jsonl"), "features": {"task": task, "language": "hau"}, "prompt": "{task}: {source}",
            "eval_files": str(data / f"{task}.test.jsonl"), **({"stream": True, "rows": 36} if task != "pos" else {}), **changes,
        }
        for task in ("ner", "pos", "rev")
    ]  # fmt: skip


def test_streamed_data_trains_and_resumes_bit_for_bit(config: Write, tmp_path: Path, data: Path) -> None:  # fmt: skip
    common = {
        "datasets": streamed(data), "held_out": [], "evaluation": {"at_end": False},
        "training": {"steps": 40, "save_every": 15, "log_every": 5, "batch_size": 4, "keep_checkpoints": 9},
    }  # fmt: skip
    path = config(**common)
    whole = ok("train", path)
    weights = weights_of(tmp_path / "run")
    mixture = json.loads((tmp_path / "run" / "mixture.json").read_text())
    assert [(c["cell"], c["rows"], c["drawn"]) for c in mixture["cells"]] == [
        (f"task={task},language=hau", 36, None) for task in ("pos", "ner", "rev")
    ]
    assert {*whole["training"]["training_rows"].values()} == {36}
    for name in ("adapter", "checkpoints/checkpoint-30", "checkpoints/checkpoint-40"):
        shutil.rmtree(tmp_path / "run" / name)
    resumed = ok("train", path, "--resume")
    assert weights_of(tmp_path / "run") == weights
    assert resumed["training"]["losses"] == whole["training"]["losses"]


def test_what_streams_cannot_do(config: Write, data: Path) -> None:
    def refused(**changes: Any) -> str:
        result = run(app, ["train", str(config(datasets=streamed(data, **changes), held_out=[]))])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        return result.stderr

    assert "rows: goes with stream: true" in refused(stream=False)
    assert "leave out eval_rows: and give eval_files:" in refused(eval_rows=2)
    assert "say how many rows they have: rows:" in refused(rows=None, stream=True)
    named = {"files": str(data / "{language}.jsonl"), "features": {"task": "ner"}, "stream": True, "rows": 3}  # fmt: skip
    assert "features: must say the language of all rows" in refused(**named)
    labelled = {"kind": "classification", "stream": True, "rows": 36}
    assert "the labels of a stream are not known before it is read; give labels:" in refused(**labelled)  # fmt: skip
    path = config(datasets=streamed(data), held_out=[], training={"similar_lengths": True})
    assert "looks ahead, which streams do not allow" in run(app, ["train", str(path)]).stderr
    column = {"features": {"task": "ner"}, "feature_columns": {"language": "lang"}, "stream": True, "rows": 36}  # fmt: skip
    assert "what its rows activate is not known before they are read" in refused(**column)
