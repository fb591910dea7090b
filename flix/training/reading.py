"""Reading a configuration file: YAML that is checked, with messages that name file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flix.core.errors import listed, near, shown
from flix.core.strictyaml import Place, Tree, read_text, read_tree
from flix.training.errors import SettingsError, missing_extra

if TYPE_CHECKING:
    from flix.training.settings import Settings


def read_settings(path: str | Path) -> Settings:
    """Read and check a training configuration.

    Args:
        path: a YAML file; relative paths in it are relative to its folder.

    Raises:
        SettingsError: no such file, no YAML, a key given twice or unknown (with near matches), a value that breaks a
            rule, or one that YAML reads as another thing than it looks; file and line are named.
        MissingFrameworkError: pydantic or PyYAML is not installed.
    """
    file = Path(path)
    return parse_settings(read_text(file), str(file), file.parent)


def parse_settings(text: str, name: str = "config", folder: Path = Path(".")) -> Settings:
    """Check the text of a configuration; see :func:`read_settings`.

    Args:
        text: YAML.
        name: what to call it in messages.
        folder: what relative paths are relative to.
    """
    try:
        import yaml  # noqa: F401 - asked for here, so that its lack is one line
        from pydantic import ValidationError

        from flix.training.settings import Settings
    except ImportError as error:
        raise missing_extra("reading a configuration", "cli", error) from None
    tree = read_tree(text, name)
    data = tree.data
    if not isinstance(data, dict):
        raise SettingsError(f"{name}: a configuration is a mapping of keys, got {shown(data, 60)}")
    if "base_folder" in data:
        line = _line(("base_folder",), tree.lines)
        raise SettingsError(f"{name}:{line}: unknown key 'base_folder'")
    try:
        return Settings.model_validate({**data, "base_folder": folder})
    except ValidationError as error:
        raise SettingsError(_message(error.errors(), tree, name)) from None
    except RecursionError:
        raise SettingsError(f"{name}: values nest too deeply") from None


def _line(place: Place, lines: dict[Place, int]) -> int:
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def _message(errors: Sequence[Any], tree: Tree, name: str) -> str:
    """The first error by line, in words; with how many more there are."""
    lines = tree.lines
    placed: list[tuple[int, int, Place, Any]] = []
    for error in errors:
        place = _yaml_place(tuple(error["loc"]), lines)
        placed.append((_line(place, lines), len(placed), place, error))
    # Of the alternatives of one value, the one that got furthest into it says most.
    line, _, place, error = min(
        placed,
        key=lambda item: (item[0], item[3]["type"] != "extra_forbidden", -len(item[2]), item[1]),
    )
    text = _text(place, error, [e for _, _, p, e in placed if p == place], tree.words.get(place))
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


def _text(place: Place, error: Any, same: Sequence[Any], word: tuple[str, str] | None) -> str:
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
