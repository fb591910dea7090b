"""Reads a study's configuration, and the settings of ``flix train`` that it uses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.errors import SettingsError, listed, near
from flix.core.features.cells import HeldOut, MixtureError
from flix.core.strictforms import Reading
from flix.core.strictyaml import read_text
from flix.study.settings import ArmSettings, Layers, StudySettings
from flix.training.errors import missing_extra
from flix.training.reading import parse_settings, read_settings
from flix.training.settings import RULES, Settings

CONFIGS = Path(__file__).parent / "configs"
_FORM = Reading(StudySettings, (), "rule", RULES, "rank rule")
Raw = dict[str, Any]
"""Settings of ``flix train`` as a mapping, not checked yet."""


@dataclass(frozen=True)
class Study:
    """A study's configuration, with the settings that it names.

    Attributes:
        name: the name of the configuration's file, for messages.
        title: the name of the study.
        settings: the configuration itself.
        output: the folder to write.
        common: the settings that all arms have in the last runs; paths in it are absolute.
        choosing: the same for the runs of the first phase; None without it.
        files: the files that all of this was read from.
    """

    name: str
    title: str
    settings: StudySettings
    output: Path
    common: Raw
    choosing: Raw | None
    files: tuple[Path, ...] = ()


def read_study(
    config: str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    small: bool = False,
    steps: int | None = None,
) -> Study:
    """Read and check a study's configuration.

    Args:
        config: a YAML file, or the name of a shipped study.
        data: the folder at which relative paths in it start; default: the folder of the file, or the current folder
            for a shipped study.
        out: the folder to write, in place of ``output``.
        small: read the small form.
        steps: how many steps the last runs take, in place of ``training.steps``; needs ``out``.

    Raises:
        SettingsError: there is no such file, it is not YAML, or it (or a file that it names) has an unknown key or a
            value that breaks a rule; or it has no small form.
        MissingFrameworkError: pydantic or PyYAML is not installed.
    """
    try:
        import yaml  # noqa: F401 - asked for here, so that its lack is one line
    except ImportError as error:
        raise missing_extra("reading a study", "cli", error) from None
    file, shipped = _file(config)
    name = str(file)
    text = read_text(file)
    form: StudySettings = _FORM.read(text, name)
    if small:
        form = _small(form, text, name)
    folder = Path(data) if data is not None else Path() if shipped else file.parent
    form = form.model_copy(
        update={"arms": {name: _at_home(arm, folder) for name, arm in form.arms.items()}}
    )
    home = Path() if shipped else file.parent
    if steps is not None and out is None:
        raise SettingsError(
            f"{name}: --steps {steps} makes another study; give it a folder of its own with --out"
        )
    files = [file]
    common = _layered(form.common, folder, f"{name}: common", files)
    if steps is not None:
        common = over_settings(common, {"training": {"steps": steps}})
    choosing = None
    if form.choosing is not None:
        own = form.choosing.common
        choosing = (
            common if own is None else _layered(own, folder, f"{name}: choosing.common", files)
        )
    given = Path(out) if out is not None else home / os.path.expanduser(form.output)
    if small and out is None:
        given = given.with_name(f"{given.name}-small")
    return Study(name, file.stem, form, given.resolve(), common, choosing, tuple(files))


def _at_home(arm: ArmSettings, folder: Path) -> ArmSettings:
    """An arm whose own settings have absolute paths."""
    return arm.model_copy(update={"settings": placed(arm.settings, folder)})


def _file(config: str | Path) -> tuple[Path, bool]:
    """The file of a configuration, and whether it is one that is shipped."""
    file = Path(config)
    shipped = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if str(config) in shipped and not file.is_file():
        return CONFIGS / f"{config}.yaml", True
    if not file.suffix and not file.exists():
        raise SettingsError(
            f"{file}: there is no such file, and no study of this name{near(str(config), shipped)}; shipped are: "
            f"{listed(shipped)}"
        )
    return file, False


def _small(form: StudySettings, text: str, name: str) -> StudySettings:
    """The small form: what ``small:`` says, over the rest."""
    import yaml

    if not form.small:
        raise SettingsError(f"{name}: this study has no small form (small:)")
    raw, over = yaml.safe_load(text), dict(form.small)
    del raw["small"]
    wanted = over.pop("arms", None)
    if wanted is not None:
        if not isinstance(wanted, list) or not all(isinstance(arm, str) for arm in wanted):
            raise SettingsError(f"{name}: small.arms: must be a list of arms' names")
        for arm in wanted:
            if arm not in raw["arms"]:
                raise SettingsError(
                    f"{name}: small.arms: there is no arm {arm!r}{near(arm, raw['arms'])}; the arms are: "
                    f"{listed(raw['arms'], 40)}"
                )
        raw["arms"] = {arm: raw["arms"][arm] for arm in wanted}
        raw["claims"] = [c for c in raw.get("claims", []) if {c["arm"], *c["against"]} <= {*wanted}]
    for key, place in (("common", raw), ("common", raw.get("choosing") or {})):
        more = over.pop(key, None) if place is raw else (over.get("choosing") or {}).pop(key, None)
        if more is not None:
            before = place.get(key, [])
            place[key] = [*(before if isinstance(before, list) else [before]), more]
    raw = merged(raw, over)
    for key, value in ((raw.get("choosing") or {}).get("choices") or {}).copy().items():
        if value is None:  # not to be chosen in the small form
            del raw["choosing"]["choices"][key]
    small: StudySettings = _FORM.read(json.dumps(raw, ensure_ascii=False), f"{name}, small")
    return small


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Raw:
    """One mapping over another, key by key at every depth."""
    found = dict(base)
    for key, value in over.items():
        below = found.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        found[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return found


def over_settings(base: Mapping[str, Any], over: Mapping[str, Any]) -> Raw:
    """Settings over others: merged key by key, but ranks are one rule and replace the other."""
    found = merged(base, over)
    if "ranks" in over:
        found["ranks"] = over["ranks"]
    return found


def _layered(layers: Layers, folder: Path, where: str, files: list[Path]) -> Raw:
    """Settings and files of settings, each over the one before; the files join those that were read."""
    found: Raw = {}
    for layer in layers if isinstance(layers, list) else [layers]:
        if isinstance(layer, str):
            file = folder / os.path.expanduser(layer)
            if not file.is_file():
                raise SettingsError(
                    f"{where} names the file {str(file)!r}, which does not exist; relative paths start at "
                    f"{str(folder)!r}"
                )
            files.append(file)
            given, home = (
                read_settings(file).model_dump(mode="json", exclude_unset=True),
                file.parent,
            )
        else:
            given, home = layer, folder
        found = over_settings(found, placed(given, home))
    return found


def placed(raw: Mapping[str, Any], folder: Path) -> Raw:
    """Settings whose paths are absolute: what they were relative to may be elsewhere than what is written of them."""
    found = dict(raw)
    for key in ("model", "tokenizer", "start_from"):
        if isinstance(name := found.get(key), str) and (path := _at(folder, name)).exists():
            found[key] = str(path)
    if isinstance(found.get("datasets"), list):
        found["datasets"] = [
            _dataset(d, folder) if isinstance(d, Mapping) else d for d in found["datasets"]
        ]
    return found


def _dataset(dataset: Mapping[str, Any], folder: Path) -> Raw:
    found = dict(dataset)
    for key in ("files", "eval_files"):
        names = found.get(key)
        if isinstance(names, str):
            found[key] = str(_at(folder, names))
        elif isinstance(names, list):
            found[key] = [str(_at(folder, name)) for name in names]
    hub = found.get("hub")
    if isinstance(hub, str) and _at(folder, hub).exists():
        found["hub"] = str(_at(folder, hub))
    return found


def _at(folder: Path, name: str) -> Path:
    return Path(os.path.abspath(folder / os.path.expanduser(name)))


def checked(raw: Raw, where: str) -> Settings:
    """Settings of ``flix train``, checked.

    Raises:
        SettingsError: an unknown key or a value that breaks a rule.
    """
    try:
        return parse_settings(json.dumps(raw, ensure_ascii=False), where)
    except SettingsError as error:  # the line is of a text that nobody wrote
        raise SettingsError(
            re.sub(rf"^{re.escape(where)}:\d+: ", f"{where}: ", str(error))
        ) from None


def arm_title(name: str, arm: ArmSettings) -> str:
    """What people call an arm."""
    return arm.title or name


def cells_of(cells: Any, key: str) -> HeldOut:
    """The cells that a key of the configuration lists.

    Raises:
        SettingsError: an ill-formed one; the key and its place are named.
    """
    try:
        return HeldOut(cells)
    except MixtureError as error:  # it names the key that they mostly have
        raise SettingsError(f"{key}{str(error).removeprefix('held_out')}") from None


def without(raw: Raw, cells: Any, key: str = "leave_out") -> Raw:
    """Settings without the data sets all of whose rows have one of these features, and without what these imply.

    Raises:
        SettingsError: ill-formed cells, or cells that no data set has; ``key`` says where they stand.
    """
    if not cells:
        return raw
    left = cells_of(cells, key)
    kept = [d for d in raw.get("datasets", []) if not left.covers(d.get("features") or {})]
    if len(kept) == len(raw.get("datasets", [])):
        raise SettingsError(
            f"{key}: there is no data set whose rows all have {listed(map(_written, left.cells))}"
        )
    gone = {f"{group}={name}" for cell in left.cells for group, name in cell.items() if len(cell) == 1}  # fmt: skip
    implies = {k: v for k, v in (raw.get("implies") or {}).items() if k not in gone}
    return {**raw, "datasets": kept, "implies": implies}


def _written(cell: Mapping[str, str]) -> str:
    return ",".join(f"{group}={name}" for group, name in cell.items())
