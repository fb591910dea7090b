"""What several runs show while they run."""

from __future__ import annotations

import io
from pathlib import Path

from flix.study.display import Display, Live, Progress, span
from flix.study.jobs import Job
from flix.study.summary import rank_rows

JOBS = [Job(f"flix, seed {seed}", Path(f"flix-{seed}"), 100) for seed in range(4)]


def events(follow):
    first, second, third, _ = JOBS
    follow(first, {"event": "training", "step": 0, "steps": 100})
    follow(second, {"event": "training", "step": 40, "steps": 100})  # an earlier call began it
    follow(first, {"event": "step", "step": 50, "steps": 100, "loss": 1.25})
    follow(second, {"event": "at", "what": "training", "step": 60, "steps": 100})
    follow(first, {"event": "evaluating", "step": 0, "steps": 900})
    follow(third, {"event": "failed", "reason": "OSError: the disk is full"})
    follow(first, {"event": "done"})


def test_time_left_counts_what_this_call_did(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(JOBS[:2])
    progress(JOBS[1], {"event": "training", "step": 50, "steps": 100})
    progress(JOBS[0], {"event": "step", "step": 20, "steps": 100, "loss": 1.0})
    now[0] = 600.0
    progress(JOBS[1], {"event": "at", "what": "training", "step": 70, "steps": 100})
    # 0.95 * 0.4 of a run in 10 minutes; 1 - 0.19 and 1 - 0.665 of them are left.
    assert progress.summary() == f"0 of 2 runs done, about {span(600 * 1.145 / 0.38)} left"
    assert span(3000) == "50 min" and span(2.6 * 3600) == "2 h 36 min"


def test_a_terminal_has_a_line_for_each_run_and_what_failed_stays(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    stream = io.StringIO()
    events(Live(JOBS, stream))
    screen: list[str] = []  # as the terminal shows it: F goes up, J clears what is below
    for part in stream.getvalue().split("\x1b[J"):
        text, _, up = part.rpartition("\x1b[") if part.endswith("F") else (part, "", "")
        screen += text.splitlines()
        if up:
            screen = screen[: len(screen) - int(up[:-1])]
    assert screen[:2] == [
        "flix, seed 2: failed: OSError: the disk is full", "flix, seed 1: step 60/100",
    ]  # fmt: skip
    assert screen[2].startswith("1 of 4 runs done, 1 failed, about ") and len(screen) == 3


def test_lines_say_steps_tests_and_ends(capsys):
    events(Display().follow(JOBS))
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0] == "flix, seed 0: step 50/100, loss 1.250" and said[1] == "flix, seed 0: evaluating"
    )
    assert said[2] == "flix, seed 2: failed: OSError: the disk is full"
    assert said[4] == "flix, seed 0: done" and said[5].startswith("1 of 4 runs done, 1 failed")
    Display(to_stderr=True).say("aside")
    assert capsys.readouterr().err == "aside\n"


def test_ranks_that_differ_within_a_group_are_a_span():
    arm = {
        "title": "FLix", "ranks": {"language": {"deu": 1, "kat": 7}, "task": 4}, "active_rank": 11, "total_rank": 30,
        "trainable": 1200, "seeds": {"0": {"seconds": 60.0}, "1": {"seconds": 80.0}},
    }  # fmt: skip
    assert rank_rows([arm]) == [["FLix", "language 1 to 7, task 4", "11", "30", "1,200", "70 s"]]
