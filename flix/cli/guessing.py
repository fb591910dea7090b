"""The kind of a data set, guessed from its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flix.cli.looking import Column, Looked, described
from flix.core.errors import listed
from flix.data.errors import DataError

KINDS = ("seq2seq", "causal", "classification", "regression", "tagging", "masked")
GENERATIVE = ("seq2seq", "causal")
_READS = {
    "seq2seq": "source + target (or input + output, src + tgt), or text + label",
    "causal": "messages, prompt + completion, source + target, or text + label",
    "classification": "text + label, or premise + hypothesis + label, with few different labels",
    "regression": "text + score, whose numbers are not all whole",
    "tagging": "tokens + tags",
    "masked": "text",
}
_PAIRS = (
    ("source", "target"), ("src", "tgt"), ("input", "output"), ("question", "answer"), ("document", "summary"),
)  # fmt: skip
_TURNS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"))  # fmt: skip
_TWO = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question", "passage"),
    ("text1", "text2"),
)
_TEXTS = ("text", "source", "sentence", "input", "tweet", "review", "utterance", "content", "body")
_LABELS = (
    "label",
    "target",
    "class",
    "category",
    "labels",
    "sentiment",
    "topic",
    "intent",
    "stance",
)
_SCORES = ("score", "label", "target", "similarity", "rating", "value")
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels", "upos")


@dataclass(frozen=True)
class Guess:
    """What a data set is taken for.

    Attributes:
        kind: of its task.
        columns: names of columns by what they are, where they differ from the defaults.
        prompt: template of the input; None: the source's column alone.
        labels: how many labels it has.
    """

    kind: str
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    labels: int = 0


def guess(looked: Looked, kind: str | None = None) -> Guess:
    """The kind of a data set.

    Args:
        looked: what its columns hold.
        kind: what it is said to be; default: guessed.

    Raises:
        DataError: no kind fits its columns, or the one that was said does not.
    """
    columns = {n: c for n, c in looked.columns.items() if n not in looked.feature_columns.values()}
    guesses = _guesses(columns)
    if (
        kind in GENERATIVE
    ):  # a label of words is a text to write, too, but only if that is asked for
        guesses += [replace(g, kind=kind, labels=0) for g in guesses if _in_words(g, columns)]
    found = [g for g in guesses if kind is None or g.kind == kind]
    if found:
        return found[0]
    what = f"{looked.files.pattern}: " + (f"its columns do not fit {kind}" if kind else "its kind cannot be guessed")  # fmt: skip
    forms = (
        f"{kind} needs {_READS[kind]}"
        if kind
        else "Known forms are, e.g., source + target, text + label, tokens + tags, messages, or text alone"
    )
    raise DataError(
        f"{what}; they are: {described(columns)}. {forms}; rename columns, or write the configuration by hand"
    )


def _in_words(guess: Guess, columns: Mapping[str, Column]) -> bool:
    """Whether a data set has labels that are words, not numbers."""
    name = guess.columns.get("target", "target")
    return guess.kind == "classification" and _is(columns, name, "text")


def _guesses(columns: Mapping[str, Column]) -> list[Guess]:
    """All that could be meant, the likeliest first."""
    found: list[Guess] = []
    for name, column in columns.items():
        if column.all("messages"):
            found.append(Guess("causal", {"messages": name}))
    if (words := _first(columns, _WORDS, "texts")) and (tags := _first(columns, _TAGS, "texts")):
        found.append(Guess("tagging", _other(tokens=words, tags=tags), labels=len(columns[tags].values)))  # fmt: skip
    found += _labelled(columns)
    for pairs, kinds in ((_TURNS, ("causal", "seq2seq")), (_PAIRS, ("seq2seq", "causal"))):
        for one, two in pairs:
            if _is(columns, one, "text") and _is(columns, two, "text"):
                found += [Guess(k, _other(source=one, target=two)) for k in kinds]
    if text := _first(columns, _TEXTS, "text"):
        found.append(Guess("masked", _other(source=text)))
    return found


def _labelled(columns: Mapping[str, Column]) -> list[Guess]:
    """Classification and regression: a text, or two, and a label or a number."""
    two = [pair for pair in _TWO if all(_is(columns, name, "text") for name in pair)]
    text = two[0][0] if two else _first(columns, _TEXTS, "text")
    if text is None:
        return []
    prompt = " ".join(f"{{{name}}}" for name in two[0]) if two else None
    found = []
    for name in _SCORES:
        if name != text and _is(columns, name, "number") and not columns[name].whole:
            found.append(Guess("regression", _other(source=text, target=name), prompt))
    for name in _LABELS:
        if name == text or name not in columns:
            continue
        column = columns[name]
        short = column.all("text") and column.longest <= 60 and len(column.values) <= 200
        if column.few and (short or (column.all("number") and column.whole)):
            found.append(Guess("classification", _other(source=text, target=name), prompt, len(column.values)))  # fmt: skip
    return found


def _is(columns: Mapping[str, Column], name: str, form: str) -> bool:
    return name in columns and columns[name].all(form)


def _first(columns: Mapping[str, Column], names: tuple[str, ...], form: str) -> str | None:
    return next((name for name in names if _is(columns, name, form)), None)


def _other(**columns: str) -> dict[str, str]:
    """Columns that are not called as the settings' defaults are."""
    return {what: name for what, name in columns.items() if name != what}


def check_together(guesses: Mapping[str, Guess]) -> None:
    """Refuse kinds that no model does together.

    Raises:
        DataError: generative ones beside others, or of two kinds.
    """
    kinds = {guess.kind for guess in guesses.values()}
    if kinds <= {*KINDS} - {*GENERATIVE} or len(kinds) == 1:
        return
    said = listed(f"{name} ({guess.kind})" for name, guess in guesses.items())
    raise DataError(
        f"one model learns seq2seq alone, causal alone, or the other kinds together; the data "
        f"are: {said}. Give them separately, or say --kind"
    )
