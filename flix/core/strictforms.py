"""Forms of pydantic from YAML, with messages that name file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from flix.core.errors import SettingsError, listed, near, shown
from flix.core.strictyaml import Place, Tree, read_tree


@dataclass(frozen=True)
class Reading:
    """How a form is read.

    Attributes:
        form: the pydantic model of the whole.
        hidden: its fields that files may not give.
        tagged: the name of the field that tells alternatives apart, and the models that have it.
        what: what such an alternative is called, in messages: ``"rank rule"``.
    """

    form: type[Any]
    hidden: tuple[str, ...]
    tagged: str
    alternatives: tuple[type[Any], ...]
    what: str

    def read(self, text: str, name: str, **given: Any) -> Any:
        """The form of a YAML text.

        Args:
            text: YAML.
            name: what to call it in messages.
            given: the hidden fields.

        Raises:
            SettingsError: no YAML, a key given twice or unknown (with near matches), a value that breaks a rule, or one
                that YAML reads as another thing than it looks; the line is named.
        """
        from pydantic import ValidationError

        tree = read_tree(text, name)
        if not isinstance(tree.data, dict):
            raise SettingsError(
                f"{name}: a configuration is a mapping of keys, got {shown(tree.data, 60)}"
            )
        for key in self.hidden:
            if key in tree.data:
                raise SettingsError(f"{name}:{_line((key,), tree.lines)}: unknown key {key!r}")
        try:
            return self.form.model_validate({**tree.data, **given})
        except ValidationError as error:
            raise SettingsError(_message(self, error.errors(), tree, name)) from None


def _line(place: Place, lines: dict[Place, int]) -> int:
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def _message(how: Reading, errors: Sequence[Any], tree: Tree, name: str) -> str:
    """The first error by line, in words; with how many more there are."""
    lines = tree.lines
    placed: list[tuple[int, int, Place, Any]] = []
    for error in errors:
        place = _yaml_place(tuple(error["loc"]), lines)
        placed.append((_line(place, lines), len(placed), place, error))
    # Of the alternatives of one value, the one that got furthest into it says most: what others say of the whole
    # (a list is no text) is not the mistake.
    above = {place[:length] for _, _, place, _ in placed for length in range(len(place))}
    placed = [item for item in placed if item[2] not in above]
    line, _, place, error = min(
        placed,
        key=lambda item: (item[0], item[3]["type"] != "extra_forbidden", -len(item[2]), item[1]),
    )
    text = _text(
        how, place, error, [e for _, _, p, e in placed if p == place], tree.words.get(place)
    )
    others = len({item[0] for item in placed} - {line})
    more = f" (and {others} more line{'s' if others > 1 else ''} with errors)" if others else ""
    return f"{name}:{line}: {text}{more}"


def _yaml_place(place: Place, lines: dict[Place, int]) -> Place:
    """A pydantic location without the names of alternatives that pydantic puts between keys."""
    known: Place = ()
    for number, part in enumerate(place):
        if (*known, part) in lines:
            known = (*known, part)
        elif number == len(place) - 1 and isinstance(part, str) and part.isidentifier():
            return (*known, part)
    return known


def _text(
    how: Reading, place: Place, error: Any, same: Sequence[Any], word: tuple[str, str] | None
) -> str:
    path = _path(place)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _known_keys(how, tuple(error["loc"][:-1]))
        key = str(place[-1])
        parent = _path(place[:-1])
        where = f" in {parent}" if parent else ""
        return (
            f"unknown key {key!r}{where}{near(key, known)}; known keys: {listed(sorted(known), 40)}"
        )
    if kind == "missing":
        parent = _path(tuple(p for p in place if p != error["loc"][-1]))
        return f"{parent + ': ' if parent else ''}the key {error['loc'][-1]!r} is missing"
    got = error["input"]
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        tag = str(error["ctx"]["tag"])
        return f"{path}: no {how.what} {tag!r}{near(tag, tags)}; there are: {listed(tags)}"
    if kind == "union_tag_not_found":
        tags = [str(_tag(how, form)) for form in how.alternatives]
        return f"{path}: needs a {how.tagged}: {', '.join(tags[:-1])} or {tags[-1]}"
    kinds = {e["type"] for e in same}
    if word is not None and not isinstance(got, str) and kinds & {"string_type", "bool_as_number"}:
        # What stands without quotes is not always what it looks like.
        meant = "a number" if "bool_as_number" in kinds else "text"
        if kinds >= {"string_type", "bool_as_number"}:
            meant = "text or a number"
        cure = " - quote it" if "string_type" in kinds else ""
        text, taken_as = word
        return f"{path}: must be {meant}; YAML reads {text or 'nothing'} without quotes as {taken_as} ({got}){cure}"
    if kind == "value_error":
        return f"{path}: {_reason(error)}" if path else _reason(error)
    reasons = list(dict.fromkeys(_reason(e) for e in same))
    return f"{path}: {' or '.join(reasons)}, got {shown(got, 60)}" if path else reasons[0]


def _reason(error: Any) -> str:
    message = str(error["msg"])
    for start in ("Value error, ", "Input "):
        message = message.removeprefix(start)
    message = re.sub(r"valid dictionary( or instance of \w+)?", "mapping of keys", message)
    return message[0].lower() + message[1:]


def _known_keys(how: Reading, place: Place) -> list[str]:
    """The keys of the form at a pydantic location."""
    form, free = how.form, False
    for part in place:
        if free or isinstance(part, int):
            free = False  # a name that the file chose, which may be that of a field
        elif part in form.model_fields:
            form, free = next(_models(form.model_fields[part].annotation), (form, False))
        else:
            form = next((m for m in how.alternatives if _tag(how, m) == part), form)
    return [name for name in form.model_fields if name not in how.hidden]


def _models(annotation: Any, free: bool = False) -> Iterator[tuple[Any, bool]]:
    """The models in an annotation, and whether they stand under names that the file chooses."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, free
    for inner in get_args(annotation):
        yield from _models(inner, free or get_origin(annotation) is dict)


def _tag(how: Reading, model: Any) -> Any:
    field = model.model_fields.get(how.tagged)
    return get_args(field.annotation)[0] if field is not None else None


def _path(place: Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
