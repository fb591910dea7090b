"""Reading a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flix.core.strictyaml import read_text
from flix.training.errors import missing_extra

if TYPE_CHECKING:
    from flix.training.settings import Settings


def read_settings(path: str | Path) -> Settings:
    """Read and check a training configuration.

    Args:
        path: a YAML file; relative paths in it are relative to its folder.

    Raises:
        SettingsError: no such file, invalid YAML, a key that is given twice or unknown (similar keys are suggested),
            a value that breaks a rule, or a value that YAML reads as something else than it looks like. The error
            gives the file and the line.
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

        from flix.core.strictforms import Reading
        from flix.training.settings import RULES, Settings
    except ImportError as error:
        raise missing_extra("reading a configuration", "cli", error) from None
    how = Reading(Settings, ("base_folder",), "rule", RULES, "rank rule")
    found: Settings = how.read(text, name, base_folder=folder)
    return found
