"""Which languages, tasks and sizes the quickstart's mixture has. Pure constants and arithmetic."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from .types import HeldOut

#: Raise it whenever the code would build other data from the same packages.
BUILD_VERSION = 2

DEV_ITEMS = 40
TEST_ITEMS = 60
MAX_BYTES = 64
#: Largest share of a split of a cell that may be answered by copying the input.
COPY_SHARE = 0.05
SMALLEST_TRAIN = 30
LARGEST_TRAIN = 4000


@dataclass(frozen=True, slots=True)
class Task:
    """A task: its family, the tag that opens its prompts, and its size in the largest language."""

    name: str
    family: str
    tag: str
    size: int


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lemma", "word", "lemma", 3000),
        Task("hyphen", "word", "hyphen", 1500),
        Task("num2dig", "number", "num", 1200),
        Task("num2en", "number", "numen", 800),
        Task("date2iso", "date", "date", 600),
        Task("date2en", "date", "daten", 500),
        Task("name2en", "name", "name", 450),
    )
}

#: Size of each language's data relative to the largest. The spread is set here, on purpose: the
#: packages would give every language about as much.
LANGUAGES: dict[str, float] = {
    "de": 1.0,
    "es": 0.9,
    "fr": 0.9,
    "ru": 0.8,
    "cs": 0.5,
    "sv": 0.35,
    "hu": 0.3,
    "fi": 0.25,
    "tr": 0.2,
    "id": 0.06,
    "lt": 0.05,
    "cy": 0.035,
    "sw": 0.025,
    "ka": 0.025,
}
LOW_RESOURCE_BELOW = 0.1

#: Cells never trained on, two or more for each task, half for choices and half for the last word.
HELD_OUT: dict[tuple[str, str], HeldOut] = {
    ("sv", "lemma"): "tuning",
    ("es", "lemma"): "test",
    ("cs", "hyphen"): "tuning",
    ("id", "hyphen"): "test",
    ("fr", "num2dig"): "tuning",
    ("lt", "num2dig"): "test",
    ("tr", "num2en"): "tuning",
    ("ru", "num2en"): "test",
    ("cy", "date2iso"): "tuning",
    ("sw", "date2iso"): "test",
    ("hu", "date2en"): "tuning",
    ("fi", "date2en"): "test",
    ("id", "name2en"): "tuning",
    ("de", "name2en"): "test",
    ("fi", "num2dig"): "tuning",
    ("cs", "num2en"): "test",
}

_SPACE = float(1 << 64)


def unit(seed: int, *parts: object) -> float:
    """A number in (0, 1) that depends on nothing but its arguments."""
    text = "\x1f".join(map(str, (seed, *parts)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + 0.5) / _SPACE


def split_of(seed: int, family: str, item: str) -> str:
    """The split an item belongs to, in every language and every task that share ``family``."""
    u = unit(seed, "split", family, item.casefold())
    return "dev" if u < 0.12 else "test" if u < 0.30 else "train"


def train_size(seed: int, language: str, task: str) -> int:
    """How many training pairs a cell should have where its source has that many."""
    wobble = math.exp(0.8 * (unit(seed, "size", language, task) - 0.5))
    size = round(TASKS[task].size * LANGUAGES[language] * wobble)
    return min(max(size, SMALLEST_TRAIN), LARGEST_TRAIN)


def is_low_resource(language: str) -> bool:
    """Whether the language's data is kept small in all tasks."""
    return LANGUAGES[language] < LOW_RESOURCE_BELOW
