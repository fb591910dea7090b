"""Many compositions of one adapter as LoRAs that are served side by side: names, the command line, a map of them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.adapter.composition import Composition
from flix.core.errors import ConfigError, listed
from flix.core.features.names import written
from flix.core.files import write_file
from flix.core.peft.exporting import PeftExport

MAP_FILE = "loras.json"
_AT_ONCE = 16
_PLAIN = re.compile(r"[^\w.]+")


@dataclass(frozen=True)
class Served:
    """A composition that was exported.

    Attributes:
        name: its LoRA's, which requests give as ``"model"``; the name of its folder, too.
        composition: the active features and their weights, implied ones included.
        export: what was written.
    """

    name: str
    composition: Composition
    export: PeftExport


@dataclass(frozen=True)
class PeftExports:
    """What was exported together.

    Attributes:
        directory: the folder of the LoRAs' folders.
        loras: they, in the order given.
        base: the base model's folder or hub name, or None.
    """

    directory: str
    loras: tuple[Served, ...]
    base: str | None

    @property
    def served(self) -> tuple[Served, ...]:
        """Those that vLLM takes, by the rules known here."""
        return tuple(lora for lora in self.loras if lora.export.serving.ok)

    @property
    def flags(self) -> str:
        """The flags with which one ``vllm serve`` serves them all; empty where it takes none.

        A batch of requests may use as many of them as ``--max-loras`` says, whose memory is reserved; the others wait
        in host memory.
        """
        served = self.served
        if not served:
            return ""
        rank = max(lora.export.serving.max_lora_rank or 0 for lora in served)
        modules = (shlex.quote(f"{lora.name}={lora.export.serving.folder}") for lora in served)
        return (
            f"--enable-lora --max-lora-rank {rank} --max-loras {min(len(served), _AT_ONCE)} "
            f"--max-cpu-loras {len(served)} --lora-modules {' '.join(modules)}"
        )

    @property
    def command(self) -> str:
        """The whole command line; empty where vLLM would serve none of them."""
        return f"vllm serve {shlex.quote(self.base or 'BASE')} {self.flags}" if self.served else ""

    @property
    def message(self) -> str:
        """What to tell the user."""
        lines = []
        if self.served:
            lines.append(f"to serve {len(self.served)} LoRAs with vLLM: {self.command}")
        refused = [lora for lora in self.loras if not lora.export.serving.ok]
        for problem in dict.fromkeys(
            str(p) for lora in refused for p in lora.export.serving.problems
        ):
            names = [
                lora.name for lora in refused if problem in map(str, lora.export.serving.problems)
            ]
            lines.append(f"vLLM would not serve {listed(names, 3)}: {problem}")
        notes = dict.fromkeys(note for lora in self.loras for note in lora.export.serving.notes)
        cut = [lora for lora in self.loras if lora.export.error]
        if cut:
            worst = max(cut, key=lambda lora: lora.export.error)
            lines.append(
                f"{len(cut)} were cut; the largest relative error of an update is {worst.export.error:.2e}, of {worst.name}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, which ``loras.json`` holds."""
        return {
            "base": self.base,
            "command": self.command,
            "loras": [
                {
                    "name": lora.name,
                    "features": {written(feature): weight for feature, weight in lora.composition},
                    "folder": lora.name,
                    "rank": lora.export.rank,
                    "error": lora.export.error,
                    "served": lora.export.serving.ok,
                }
                for lora in self.loras
            ],
        }

    def write_map(self) -> None:
        """Write ``loras.json`` beside the LoRAs: which name stands for which features."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_file(Path(self.directory) / MAP_FILE, text.encode())


def lora_names(
    compositions: Sequence[Composition], stated: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A name for each composition's LoRA, of letters, digits and ``. _ - +``: ``hau-ner``, ``hau0.5+swa-ner``.

    Args:
        compositions: they, all different.
        stated: the rows that they come from, whose groups and names the LoRA's name follows.

    Raises:
        ConfigError: two rows with one composition.
    """
    seen: dict[Composition, Mapping[str, Any]] = {}
    for active, row in zip(compositions, stated, strict=True):
        key = tuple(sorted(active))
        if key in seen:
            raise ConfigError(
                f"{dict(seen[key])!r} and {dict(row)!r} are one composition; export it once"
            )
        seen[key] = row
    names = [_name(row) for row in stated]
    folded = [name.casefold() for name in names]  # folders of some systems do not tell cases apart
    return [
        name
        if folded.count(name.casefold()) == 1 and name
        else f"{name or 'lora'}-{_digest(active)}"
        for name, active in zip(names, compositions, strict=True)
    ]


def folder_name(name: object) -> str:
    """A LoRA's name that a user gave, which is its folder's, too.

    Raises:
        ConfigError: it holds other characters than letters, digits and ``. _ - +``, or begins with a dot or a dash.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w+][\w.+-]*", name):
        raise ConfigError(
            f"a LoRA's name consists of letters, digits and '. _ - +', and begins with none of '.' and '-'; got {name!r}"
        )
    return name


def _name(row: Mapping[str, Any]) -> str:
    return "-".join("+".join(_parts(value)) for value in row.values() if value)[:100].strip(".-+")


def _parts(value: Any) -> list[str]:
    weights = (
        value
        if isinstance(value, Mapping)
        else dict.fromkeys([value] if isinstance(value, str) else value, 1.0)
    )
    return [
        _PLAIN.sub("_", str(name)) + (f"{weight:g}" if weight != 1.0 else "")
        for name, weight in weights.items()
        if weight is not None
    ]


def _digest(active: Composition) -> str:
    said = json.dumps(sorted((*feature, weight) for feature, weight in active))
    return hashlib.sha256(said.encode()).hexdigest()[:8]
