"""What a run says while it runs."""

from __future__ import annotations

import io
from typing import Any

import pytest

from flix.core.progress import Reporter, Silent, described, of_tasks

VALUES: dict[str, Any] = {
    "loss": 2.125, "learning_rate": 4.9e-3, "grad_norm": 0.5, "step": 7,
    "by_feature": {"language=hau": 1.0, **{f"task=t{i}": float(i) for i in range(14)}},
}  # fmt: skip


def test_lines_say_the_losses_of_tasks() -> None:
    assert described(VALUES) == (
        "loss 2.12  lr 0.0049  gradient 0.5  t0 0  t1 1  t2 2  t3 3  t4 4  t5 5"
    )
    assert described({"eval_loss": 1.5, "eval_seen.loss": 1.25}) == "eval loss 1.5  eval seen.loss 1.25"  # fmt: skip
    assert described({}) == ""
    assert of_tasks({"language=hau": 1.0, "domain=x": 2.0}) == {"hau": 1.0}
    assert of_tasks({"task=a=b": 1.0}) == {"a=b": 1.0}
    assert of_tasks({}) == {}


def test_a_reporter_writes_lines_to_its_stream() -> None:
    out = io.StringIO()
    reporter = Reporter(out)
    reporter.note("begun")
    reporter.start("training", 40, 10)
    reporter.advance(12)
    reporter.log(12, {"loss": 0.5})
    reporter.stop()
    assert out.getvalue() == "begun\nstep 12/40  loss 0.5\n"


def test_without_a_stream_lines_go_where_standard_output_is_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter()
    reporter.note("here")
    assert capsys.readouterr().out == "here\n"
    silent = Silent()
    silent.start("training", 40)
    silent.log(1, {"loss": 0.5})
    silent.note("nothing")
    silent.stop()
    assert capsys.readouterr().out == ""
