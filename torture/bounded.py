"""One call under limits: of time, of memory, and of what it may raise."""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flix import FlixError

SECONDS = 5
MEMORY = 2**30


class TooLong(BaseException):
    """The call took longer than it may; no ``except Exception`` keeps it."""


class WrongError(AssertionError):
    """What was accepted is not what it should be."""


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Tally:
    """What came of many calls.

    Attributes:
        inputs, refused, accepted: counts; what is refused raised a FlixError.
        failures: by exception and place, how often.
        examples: of the first input of each.
        slowest: seconds of the slowest call.
    """

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0

    def call(self, function: Callable[[Any], None], value: Any) -> None:
        """Call a function with an input, and count what comes of it."""
        self.inputs += 1
        begun, why = time.monotonic(), None
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
        try:
            function(value)
            self.accepted += 1
        except FlixError:
            self.refused += 1
        except TooLong:
            why = f"more than {2 * SECONDS} s"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            why = _place(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.monotonic() - begun
        self.slowest = max(self.slowest, took)
        if why is None and took > SECONDS:
            why = f"more than {SECONDS} s"
        if why is not None:
            self.failures[why] += 1
            self.examples.setdefault(why, repr(value)[:2000])

    def row(self, what: str, before: int) -> dict[str, Any]:
        """A row of the report; ``before`` is the memory of the process before the first call."""
        grown = max(0, peak() - before)
        if grown > MEMORY:
            self.failures["more than 1 GiB"] += 1
        return {
            "what": what,
            "inputs": self.inputs,
            "refused": self.refused,
            "accepted": self.accepted,
            "failed": sum(self.failures.values()),
            "slowest": round(self.slowest, 2),
            "peak": round(grown / 2**20),
            "wrong": dict(self.failures),
            "examples": self.examples,
        }


def _stop(*_: Any) -> None:
    raise TooLong


def _place(error: BaseException) -> str:
    """An exception and the last line of flix that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{Path('flix')}/" in frame.filename] or list(frames)
    last = own[-1]
    where = f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
    return f"{type(error).__name__} at {where}: {str(error)[:80]}"
