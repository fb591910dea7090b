"""``flix plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flix.cli import counting
from flix.cli.console import quiet, show, show_json, show_table
from flix.cli.options import Json
from flix.core import costs
from flix.core.adapter.files import read_description
from flix.core.config.config import FlixConfig
from flix.core.costs import Layers, Plan, active_sets, feature_cost
from flix.core.features.encoding import Row
from flix.core.features.names import written
from flix.core.strategy.decide import measured_on
from flix.core.strategy.explain import Batch, Choice
from flix.core.strategy.explain import explain as explained


def plan(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="A training YAML, a flix_config.json, or an adapter's folder."
        ),
    ],
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which strategy each layer would run, and why.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=10**9, help="Rows of a batch, for --explain.")
    ] = 16,
    length: Annotated[
        int, typer.Option("--length", min=1, max=10**9, help="Positions of a row, for --explain.")
    ] = 64,
    device: Annotated[
        str, typer.Option("--device", help="The class of devices, for --explain.")
    ] = "torch-cpu",
    as_json: Json = False,
) -> None:
    """Show ranks, parameters and FLOPs beside the matched LoRAs."""
    batch = Batch(batch_size, length, device) if explain else None
    settings, layers, rows, notes = _planned(config, explain)
    if rows is not None and not layers:
        return _show_ranks(settings, rows, notes, as_json)
    result = costs.plan(settings, layers, rows)
    choices = explained(settings, layers, rows, batch) if batch is not None else []
    if as_json:
        extra = {"strategies": [choice.to_dict() for choice in choices]} if batch else {}
        show_json({**result.to_dict(), "datasets_known": rows is not None, "notes": notes, **extra})
        return
    for note in notes:
        show(f"note: {note}")
    _show(result, known=rows is not None)
    if batch is not None:
        _show_choices(choices, batch)


def _planned(path: Path, explain: bool) -> tuple[FlixConfig, Layers, list[Row] | None, list[str]]:
    """Configuration, layers and datasets of a training YAML, an adapter's folder, or its JSON."""
    if path.is_dir() or path.suffix == ".json":
        config, layers = read_description(path)
        return config, layers, None, []
    from flix.training.reading import read_settings

    settings = read_settings(path)
    if counting.lacking():
        return counting.planned(settings, explain)
    quiet()
    from flix.core.config.unused import unused_settings
    from flix.data.display import idle_notes, trained_rows
    from flix.tasks import locate, model_layers
    from flix.tasks.starting import features_before
    from flix.training.run import prepare

    data, config = prepare(settings)
    shapes = model_layers(
        locate(settings.model, settings.base_folder),
        data.specs[0].kind,
        config.target_modules,
        config.exclude_modules,
    )
    notes = idle_notes(
        data.mixture, config.registry, features_before(settings.start_from, settings.base_folder)
    )
    return config, shapes, list(trained_rows(data.mixture)), [*notes, *unused_settings(config, shapes)]  # fmt: skip


def _show_ranks(config: FlixConfig, rows: list[Row], notes: list[str], as_json: bool) -> None:
    """What is known without the model's layers: the ranks, and the most that is active in a row."""
    ranks = {f: feature_cost(config, {}, f).rank for f in config.registry.live}
    ids = {config.registry.id(*f): rank for f, rank in ranks.items()}
    active = max(sum(ids[i] for i in row) for row in active_sets(config.registry, rows))
    if as_json:
        features = [{"group": f[0], "feature": f[1], "rank": rank} for f, rank in ranks.items()]
        known = {"layers": None, "features": features, "mixture": {"rank": active}}
        show_json({**known, "datasets_known": True, "notes": notes})
        return
    for note in notes:
        show(f"note: {note}")
    show_table(["feature", "rank"], [[written(f), rank] for f, rank in ranks.items()])
    show(f"most active rank of {len(rows)} trained combinations: {active}")


def _show(result: Plan, known: bool) -> None:
    show_table(
        ["feature", "rank", "parameters", "FLOPs/token"],
        [[written(f.feature), f.rank, f.parameters, f.flops] for f in result.features],
        title=f"{len(result.features)} features in {result.layers} layers",
    )

    def share(flops: int) -> str:
        return f"{100.0 * flops / result.base_flops:.2f}%" if result.base_flops else "-"

    show_table(
        ["method", "active rank", "parameters", "FLOPs/token", "of the base"],
        [
            [name, cost.rank, cost.parameters, cost.flops, share(cost.flops)]
            for name, cost in (
                ("FLix mixture", result.mixture),
                ("LoRA, compute-matched", result.compute_matched),
                ("LoRA, parameter-matched", result.parameter_matched),
            )
        ],
        title="beside the matched LoRAs",
    )
    if known:
        show(f"largest of {result.datasets} trained combinations; forward, adapted layers only")
    else:
        show("datasets unknown: one feature of every group taken; forward, adapted layers only")


def _show_choices(choices: list[Choice], batch: Batch) -> None:
    show_table(
        ["layers", "d_in", "d_out", "strategy", "why"],
        [
            [len(c.layers), c.shape.d_in, c.shape.d_out, c.decision.strategy, c.decision.reason]
            for c in choices
        ],
        title=f"{batch.examples} examples of {batch.positions} positions, {batch.device}",
    )
    used = measured_on(batch.device)
    show(f"measured on {used.device}: {used.when}")
