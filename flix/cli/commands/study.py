"""``flix study``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flix.cli.console import quiet, show, show_json, show_table
from flix.cli.options import Json


def study(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A study's YAML file, or the name of one that is shipped.")
    ],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Where relative paths in it start; default: its folder (the current one for a shipped study).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write, in place of output:.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="The small form (small:).")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ARM", help="This arm alone; again for more.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, max=10**9, help="Steps of the last runs, in place of training.steps; give --out, too.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, max=1024, help="Runs at a time; default: as many as processors, or one with an accelerator.")
    ] = None,
    as_list: Annotated[
        bool, typer.Option("--list", help="Show the runs and how far they are, and train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare methods: arms and seeds under one budget, choices from one grid, resumable."""
    from flix.study.display import Display
    from flix.study.reading import read_study

    read = read_study(config, data=data, out=out, small=small, steps=steps)
    from flix.study import run

    quiet()
    if as_list:
        _list(run.planned(read), as_json)
        return
    try:
        scores = run.study(
            read, only=only or [], parallel=parallel, display=Display(to_stderr=as_json)
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from here") from None
    if as_json:
        show_json(scores)
        return
    from flix.study.summary import COLUMNS, RANK_COLUMNS, rank_rows, rows

    show_table(COLUMNS, rows(scores))
    trained = [arm for arm in scores["arms"].values() if arm["seeds"]]
    show_table(RANK_COLUMNS, rank_rows(trained))
    for name in scores["missing"]:
        print(f"missing: {name}", file=sys.stderr)
    show(f"scores: {read.output / run.SCORES}")


def _list(found: list[tuple[Any, str]], as_json: bool) -> None:
    if as_json:
        show_json(
            [
                {"phase": run.phase, "arm": run.arm, "seed": run.seed, "choice": dict(run.choice), "state": state,
                 "folder": str(run.folder)}
                for run, state in found
            ]
        )  # fmt: skip
        return
    show_table(["phase", "run", "state"], [[run.phase, run.name, state] for run, state in found])
    done = sum(state == "finished" for _, state in found)
    show(f"{done} of {len(found)} runs are finished")
