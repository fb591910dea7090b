"""Commands on adapters' files alone: ``share``, ``combine`` and ``import``. None loads a framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flix.cli.console import show, show_json
from flix.cli.features import parse_choice, parse_folders
from flix.cli.folders import check_out
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.files import load_adapter, save_adapter
from flix.core.adapter.sharing import combine_adapters, select_features
from flix.core.errors import AdapterError, ConfigError
from flix.core.features.names import written
from flix.core.peft.importing import from_peft


def share_features(
    folder: Path, features: Sequence[str], out: Path, force: bool, as_json: bool
) -> None:
    """Some features of an adapter, and what they imply, as an adapter of their own."""
    adapter = load_adapter(folder)
    chosen = parse_choice(features, adapter.config.registry)
    check_out(out, force, folder)
    _write(select_features(adapter, chosen), out, as_json, "shared", _heads({str(folder): adapter}))


def combine_folders(
    folders: Sequence[Path], out: Path, conflicts: str, force: bool, as_json: bool
) -> None:
    """The features of several adapters as one adapter."""
    if len(folders) < 2:
        raise AdapterError(f"combining needs two adapters or more, got {len(folders)}")
    names = [str(folder) for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AdapterError(f"the adapter {twice[0]!r} is given twice")
    adapters = {str(folder): load_adapter(folder) for folder in folders}
    check_out(out, force, *folders)
    combined = combine_adapters(adapters, conflicts=conflicts)
    _write(combined, out, as_json, "combined", _heads(adapters))


def import_folders(
    loras: Sequence[str],
    group: str,
    out: Path,
    source: str,
    skip_modules: bool,
    force: bool,
    as_json: bool,
) -> None:
    """LoRAs that PEFT wrote as one adapter, each a feature."""
    if source != "peft":
        raise ConfigError(f"--from: flix imports from peft, got {source!r}")
    folders = parse_folders(loras)
    check_out(out, force, *folders.values())
    adapter = from_peft(folders, group, skip_modules=skip_modules)
    _write(adapter, out, as_json, "imported", [])


def _heads(adapters: Mapping[str, Adapter]) -> list[str]:
    return [folder for folder, adapter in adapters.items() if adapter.heads]


def _write(adapter: Adapter, out: Path, as_json: bool, what: str, heads: list[str]) -> None:
    save_adapter(adapter, out)
    names = [written(feature) for feature in adapter.config.registry.live]
    if as_json:
        show_json(
            {
                "out": str(out),
                "features": names,
                "layers": len(adapter.layers),
                "parameters": sum(t.size for t in adapter.tensors.values()),
                "heads_left_out": heads,
            }
        )
        return
    show(f"{what} {', '.join(names)}: {out}")
    for folder in heads:
        show(f"note: the trained heads of {folder} were left out")
