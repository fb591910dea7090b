"""``flix inspect``."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from flix.cli.console import show, show_json, show_table
from flix.cli.options import AdapterFolder, Json
from flix.core.adapter.composition import untrained, untrained_note
from flix.core.adapter.description import as_dict
from flix.core.adapter.files import load_adapter
from flix.core.adapter.similarity import update_norms
from flix.core.config.config import FlixConfig
from flix.core.costs import feature_cost
from flix.core.features.names import written


def inspect(
    adapter: AdapterFolder,
    layers: Annotated[bool, typer.Option("--layers", help="Show norms by layer too.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Only name the values that are not finite; end with 1 if any."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show an adapter's features, ranks, layers, and the norm of each update."""
    if check:
        raise typer.Exit(check_adapter(adapter, as_json))
    inspect_adapter(adapter, layers, as_json)


def check_adapter(folder: Path, as_json: bool) -> int:
    """Name what holds values that are not finite: 1 if anything does, else 0."""
    adapter = load_adapter(folder, finite=False)
    broken = [
        (written(feature), path)
        for feature in adapter.config.registry.live
        for path in adapter.layers
        if not all(np.isfinite(part).all() for part in adapter.pair(path, feature))
    ]
    if as_json:
        show_json({"not_finite": [{"feature": f, "layer": path} for f, path in broken]})
    for feature, path in () if as_json else broken:
        show(f"{feature} has values that are NaN or infinite in layer {path}")
    if not broken and not as_json:
        show(f"{folder}: all values are finite")
    return int(bool(broken))


def inspect_adapter(folder: Path, by_layer: bool, as_json: bool) -> None:
    """What an adapter's folder holds."""
    adapter = load_adapter(folder)
    config, norms = adapter.config, update_norms(adapter)
    live = {config.registry.id(*f): f for f in config.registry.live}
    removed = [written(f) for f in config.registry.features if f in config.registry.removed]
    total = {f: float(np.sqrt(sum(n * n for n in per.values()))) for f, per in norms.items()}
    costs = {f: feature_cost(config, adapter.layers, f) for f in live.values()}
    names = {i: written(f) for i, f in live.items()}
    idle = untrained(adapter)
    if as_json:
        implied = _implied(config, names)
        show_json(
            {
                "adapter": str(folder),
                "config": config.to_dict(),
                "parameters": sum(c.parameters for c in costs.values()),
                "features": [
                    {
                        "id": i,
                        "group": f[0],
                        "feature": f[1],
                        "rank": costs[f].rank,
                        "parameters": costs[f].parameters,
                        "implies": implied[i],
                        "norm": total[f],
                        "norms": norms[f],
                    }
                    for i, f in live.items()
                ],
                "removed": removed,
                "never_trained": [written(f) for f in idle],
                "layers": {path: as_dict(s) for path, s in adapter.layers.items()},
            }
        )
        return
    groups = ", ".join(
        f"{group} ({len(config.registry.ids_of(group))})" for group in config.registry.groups
    )
    dropout = config.feature_dropout
    rates = dropout.rates(config.registry) if dropout else {}
    show(f"{folder}: {len(live)} features in {groups}; {len(adapter.layers)} layers")
    if removed:
        show(f"removed, their ids reserved: {', '.join(removed)}")
    show(
        f"scaling {config.scaling}, seed {config.seed}, unknown features: {config.unknown}, "
        f"feature dropout: {', '.join(f'{g} {p:g}' for g, p in rates.items()) or 'none'}"
        + (f", lora_dropout: {config.lora_dropout:g}" if config.lora_dropout else "")
    )
    show_table(
        ["id", "feature", "rank", "parameters", "norm of update", "implies"],
        [
            [i, names[i], costs[f].rank, costs[f].parameters, total[f],
             _some(config, names, i)]
            for i, f in live.items()
        ],
    )  # fmt: skip
    if idle:
        show(f"note: {untrained_note(idle)}")
    if by_layer:
        show_table(
            ["layer", "kind", "experts", "d_in", "d_out", *names.values()],
            [
                [
                    path,
                    s.kind,
                    s.experts or "",
                    s.d_in,
                    s.d_out,
                    *(norms[f][path] for f in live.values()),
                ]
                for path, s in adapter.layers.items()
            ],
            title="norm of each feature's update by layer",
        )


_SHOWN, _MOST = 20, 100_000


def _some(config: FlixConfig, names: dict[int, str], feature: int) -> str:
    """The first features that one implies; a chain of features implies more in all than anybody could read."""
    found = [names[j] for j in islice(config.registry.walk_implied(feature), _SHOWN + 1)]
    return " ".join([*found[:_SHOWN], *(["..."] if len(found) > _SHOWN else [])])


def _implied(config: FlixConfig, names: dict[int, str]) -> dict[int, list[str] | None]:
    """What each feature implies; None for those beyond the first hundred thousand names in all."""
    found: dict[int, list[str] | None] = {}
    left = _MOST
    for feature in names:
        own = [names[j] for j in islice(config.registry.walk_implied(feature), left + 1)]
        left -= len(own)
        found[feature] = own if left >= 0 else None
        left = max(left, 0)
    return found
