"""Reading a configuration file: YAML that is checked, with messages that name file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flix.core.errors import listed, near
from flix.training.errors import SettingsError, missing_extra

if TYPE_CHECKING:
    from flix.training.settings import Settings

Place = tuple[Any, ...]
"""The way to a value: keys and positions, e.g. ``("datasets", 0, "files")``."""


def read_settings(path: str | Path) -> Settings:
    """Read and check a training configuration.

    Args:
        path: a YAML file; relative paths in it are relative to its folder.

    Raises:
        SettingsError: no such file, no YAML, a key given twice or unknown (with near matches), or a value that
            breaks a rule; file and line are named.
        MissingFrameworkError: pydantic or PyYAML is not installed.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror or error}") from None
    return parse_settings(text, str(file), file.parent)


def parse_settings(text: str, name: str = "config", folder: Path = Path(".")) -> Settings:
    """Check the text of a configuration; see :func:`read_settings`.

    Args:
        text: YAML.
        name: what to call it in messages.
        folder: what relative paths are relative to.
    """
    try:
        import yaml
        from pydantic import ValidationError

        from flix.training.settings import Settings
    except ImportError as error:
        raise missing_extra("reading a configuration", "cli", error) from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(tree, name)) if tree is not None else {}
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise SettingsError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    if not isinstance(data, dict):
        raise SettingsError(f"{name}: a configuration is a mapping of keys, got {_short(data)}")
    if "base_folder" in data:
        raise SettingsError(f"{name}:{_line(('base_folder',), lines)}: unknown key 'base_folder'")
    try:
        return Settings.model_validate({**data, "base_folder": folder})
    except ValidationError as error:
        raise SettingsError(_message(error.errors(), lines, name)) from None


def _lines(node: Any, name: str, place: Place = ()) -> Iterator[tuple[Place, int]]:
    """The line of every key and value of a YAML tree; refuses keys given twice."""
    import yaml

    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise SettingsError(
                        f"{name}:{line}: key {key.value!r} is given twice (first in line {seen[key.value]})"
                    )
                seen[key.value] = line
                yield from _lines(value, name, (*place, key.value))
                yield (*place, key.value), line
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, name, (*place, number))


def _line(place: Place, lines: dict[Place, int]) -> int:
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def _message(errors: Sequence[Any], lines: dict[Place, int], name: str) -> str:
    """The first error by line, in words; with how many more there are."""
    placed: list[tuple[int, int, Place, Any]] = []
    for error in errors:
        place = _yaml_place(tuple(error["loc"]), lines)
        placed.append((_line(place, lines), len(placed), place, error))
    # Of the alternatives of one value, the one that got furthest into it says most.
    line, _, place, error = min(
        placed,
        key=lambda item: (item[0], item[3]["type"] != "extra_forbidden", -len(item[2]), item[1]),
    )
    text = _text(place, error, [e for _, _, p, e in placed if p == place])
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


def _text(place: Place, error: Any, same: Sequence[Any]) -> str:
    path = _path(place)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _known_keys(tuple(error["loc"][:-1]))
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
        return f"{path}: no rank rule {tag!r}{near(tag, tags)}; the rules are: {listed(tags)}"
    if kind == "union_tag_not_found":
        return f"{path}: ranks need a rule: uniform, by_group, explicit, proportional, compute_matched or parameter_matched"
    if isinstance(got, bool) and any(e["type"] == "string_type" for e in same):
        word = "no/off/false" if got is False else "yes/on/true"
        return f"{path}: must be text; YAML reads {word} without quotes as {got} - quote it"
    if kind == "value_error":
        return f"{path}: {_reason(error)}" if path else _reason(error)
    reasons = list(dict.fromkeys(_reason(e) for e in same))
    return f"{path}: {' or '.join(reasons)}, got {_short(got)}" if path else reasons[0]


def _reason(error: Any) -> str:
    message = str(error["msg"])
    for start in ("Value error, ", "Input "):
        message = message.removeprefix(start)
    message = re.sub(r"valid dictionary( or instance of \w+)?", "mapping of keys", message)
    return message[0].lower() + message[1:]


def _known_keys(place: Place) -> list[str]:
    """The keys of the form at a pydantic location."""
    from pydantic import BaseModel

    from flix.training import settings

    form: type[BaseModel] = settings.Settings
    for part in place:
        if isinstance(part, int):
            continue
        field = form.model_fields.get(str(part))
        if field is None:
            tagged = [m for m in _models(settings.Ranks) if _tag(m) == part]
            if tagged:
                form = tagged[0]
            continue
        if models := list(_models(field.annotation)):
            form = models[0]
    return [name for name in form.model_fields if name != "base_folder"]


def _models(annotation: Any) -> Iterator[Any]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _tag(model: Any) -> Any:
    field = model.model_fields.get("rule")
    return get_args(field.annotation)[0] if field is not None else None


def _path(place: Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
