"""What a long command shows while it works."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from flix.cli import console

VALUES: dict[str, Any] = {
    "loss": 2.125, "learning_rate": 4.9e-3, "grad_norm": 0.5,
    "by_feature": {"language=hau": 1.0, **{f"task=t{i}": float(i) for i in range(14)}},
}  # fmt: skip


def test_a_live_table_of_steps_losses_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = console.Bars()
    bars.advance(1)  # before and after the work, nothing is shown
    bars.log(1, VALUES)
    monkeypatch.setattr("rich.live.Live.start", lambda self, refresh=False: None)
    bars.start("training", 40, 10)
    bars.log(12, VALUES)
    bars.log(14, {**VALUES, "by_feature": {"task=t[x]": 0.5, "task=t3": 2.75}})
    bars.log(14, {"eval_loss": 1.5})
    bars.advance(14)
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=False).print(bars._view())
    text = out.getvalue()
    assert "training" in text and "14/40" in text and "left" in text
    assert "step 14  loss 2.12  lr 0.0049" in text and "step 14  eval loss 1.5" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["t3", "2.750", "3.000"] in lines and ["t0", "0.000"] in lines
    assert ["and", "3", "more"] in lines and not any("t13" in line for line in lines)
    assert max(map(len, text.splitlines())) <= 80
    bars.stop()
    bars.stop()


def test_of_several_processes_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert type(console.make_reporter(False)).__name__ == "Silent"
    monkeypatch.setenv("RANK", "0")
    assert type(console.make_reporter(False)).__name__ == "Lines"
