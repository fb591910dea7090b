"""Output: tables and progress bars on a terminal, plain lines otherwise, JSON on request; and one line for errors."""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import typer

from flix.cli.streams import drop_output, flush, mistake, say
from flix.cli.written import json_text, output_encoding
from flix.core.errors import FlixError
from flix.core.progress import Reporter, Silent, described, of_tasks
from flix.core.tables import LINE, Cell, blocks_of, cell_text, is_numeric, text_table

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose user's mistakes end it with one line on standard error and exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                plain = warnings.showwarning
                warnings.showwarning = functools.partial(_show_warning, plain)
                command(*args, **kwargs)
            flush()
        except BrokenPipeError:
            # The reader of our output went away (a pager, head): no error.
            drop_output()
            raise typer.Exit(0) from None
        except FlixError as error:
            fail(str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}")
        except KeyboardInterrupt as error:
            # The error itself is true whatever it says, and Ctrl-C says nothing.
            print(f"flix: {str(error) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if (reason := _of_the_machine(error)) is None:
                raise
            fail(reason)

    return run


def _of_the_machine(error: Exception) -> str | None:
    """In words, an error of a library that is neither flix's nor the library's mistake; None for any other."""
    kind = type(error)
    if kind.__module__.partition(".")[0] in ("safetensors", "safetensors_rust"):
        return f"a file cannot be written or read: {error}"
    if kind.__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory: {error}. Try a smaller batch_size"
    return None


def _show_warning(plain: Callable[..., None], message: Any, category: Any, *more: Any, **named: Any) -> None:  # fmt: skip
    """flix's own warnings as one line, without a place in its code."""
    if category is UserWarning:
        print("flix: warning: " + " ".join(str(message).split()), file=sys.stderr)
    else:
        plain(message, category, *more, **named)


def fail(message: str) -> None:
    """End with one line on standard error and exit code 2.

    Raises:
        typer.Exit: always.
    """
    raise typer.Exit(mistake(message)) from None


def is_terminal() -> bool:
    """Whether standard output is a terminal, and rich is installed."""
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    from importlib.util import find_spec

    return find_spec("rich") is not None


def show_json(data: Any) -> None:
    """Data as JSON on standard output, over several lines; see :func:`flix.cli.written.json_text`."""
    say(json_text(data, encoding=output_encoding(), indent=1))


def show(text: str) -> None:
    """A line on standard output."""
    say(text)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "") -> None:
    """A table; columns whose cells are numbers are set to the right, and what is too wide for a line stands beneath."""
    if not is_terminal():
        say("\n".join([*([title] if title else []), text_table(columns, rows, width=LINE)]))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for block in blocks_of(columns, rows, console.width - 4, gap=3):
        table = Table(title=title or None, title_justify="left")
        for i in block:
            justify: Any = "right" if is_numeric(rows, i) else "left"
            table.add_column(columns[i], justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell_text(row[i])) for i in block))
        console.print(table)
        title = ""


def make_reporter(as_json: bool) -> Reporter:
    """How a long command reports: bars on a terminal, plain lines otherwise; on standard error beside JSON.

    Of several processes that train together, only the first one says anything.
    """
    if os.environ.get("RANK", "0") != "0":
        return Silent()
    if as_json:
        return Lines(sys.stderr)
    return Bars() if is_terminal() else Lines()


class Lines(Reporter):
    """Plain lines; while nothing else is said, how far the work is, now and then.

    If nobody reads them any more the work continues: hours of it are not lost to a pager that was closed.
    """

    interval = 15.0

    def note(self, text: str) -> None:
        try:
            super().note(text)
        except OSError as error:
            drop_output()
            why = "nobody reads the output any more"
            if not isinstance(error, BrokenPipeError):
                why = f"the output cannot be written ({error.strerror})"
            print(f"flix: {why}; the work continues", file=sys.stderr)

    def start(self, what: str, total: int, done: int = 0) -> None:
        super().start(what, total, done)
        self._began, self._said, self._at = time.monotonic(), time.monotonic(), done
        self.note(f"{what}: {total} {'steps' if what == 'training' else 'rows'}")

    def advance(self, done: int) -> None:
        if time.monotonic() - self._said > self.interval:
            self._said = time.monotonic()
            self.note(f"{self._what}: {done}/{self._total}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._said = time.monotonic()
        pace = (self._said - self._began) / max(step - self._at, 1)
        self.note(f"step {step}/{self._total}  {described(values)}  {pace:.2f} s/step")


class Bars(Reporter):
    """A live table: how far the work is and how long it takes yet, the last numbers, and the loss of each task."""

    most = 12  # tasks that are shown

    def __init__(self) -> None:
        super().__init__()
        self._live: Any = None

    def start(self, what: str, total: int, done: int = 0) -> None:
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().start(what, total, done)
        self.stop()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._numbers: dict[str, str] = {}
        self._losses: dict[str, list[float]] = {}
        self._live = Live(self._view(), refresh_per_second=4)
        self._live.start()

    def _view(self) -> Any:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("task", "loss", "before"):
            table.add_column(name, justify="left" if name == "task" else "right")
        for name, losses in list(self._losses.items())[: self.most]:
            table.add_row(escape(name), *(f"{loss:.3f}" for loss in reversed(losses[-2:])))
        if (more := len(self._losses) - self.most) > 0:
            table.add_row(f"and {more} more")
        lines = [escape(text) for text in self._numbers.values()]
        return Group(self._bar, *lines, *([table] if self._losses else []))

    def advance(self, done: int) -> None:
        if self._live is not None:
            self._bar.update(self._task, completed=done)

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self._live is None:
            return
        kind = "evaluation" if any(name.startswith("eval_") for name in values) else "training"
        plain = {name: value for name, value in values.items() if name != "by_feature"}
        self._numbers[kind] = f"step {step}  {described(plain)}"
        for name, loss in of_tasks(values.get("by_feature", {})).items():
            self._losses.setdefault(name, []).append(loss)
        self._live.update(self._view())

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def quiet() -> None:
    """Silence what transformers and datasets print of their own accord."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        from transformers.utils import logging
    except ImportError:
        return
    transformers_logging: Any = logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
