"""``flix export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flix.cli.composed import composed, idle_json, load_base, note_idle, told
from flix.cli.console import fail, show, show_json, show_table
from flix.cli.features import parse_combinations
from flix.cli.options import AdapterFolder, Base, Force, Json, Out
from flix.cli.vllm import ask_vllm
from flix.core.adapter.composition import untrained
from flix.core.adapter.files import load_adapter
from flix.core.errors import ConfigError
from flix.core.features.names import written
from flix.core.peft.serving import MAP_FILE


def export(
    adapter: AdapterFolder,
    out: Out,
    base: Base = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features",
            metavar="GROUP=NAME,...",
            help="One composition, e.g. language=hau,task=ner; language=hau:0.5+swa:0.5 mixes.",
        ),
    ] = None,
    everything: Annotated[
        list[str] | None,
        typer.Option(
            "--all",
            metavar="COMBINATIONS",
            help="Many: 'language=*,task=ner|pos', or @FILE with one a line. Each becomes a LoRA in DIR.",
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="The format: peft.")] = "peft",
    compress_to: Annotated[
        int | None,
        typer.Option(
            "--compress-to",
            metavar="RANK",
            help="Cut a larger rank to this one, and say the error.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write compositions as LoRAs that PEFT opens, and say how vLLM serves them."""
    if (features is None) == (everything is None):
        fail("give --features for one composition, or --all for many")
    if to != "peft":
        raise ConfigError(f"--to: flix exports to peft, got {to!r}")
    if everything is not None:
        export_all(adapter, base, everything, out, compress_to, force, as_json)
    else:
        export_one(adapter, base, features or [], out, compress_to, force, as_json)


def export_one(
    folder: Path,
    base: str | None,
    features: Sequence[str],
    out: Path,
    compress_to: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write one composition as a LoRA that PEFT and vLLM open, and say whether vLLM serves it."""
    model, _, row, active, idle = composed(folder, base, features, out, force)
    from flix.backends.torch import export_peft

    result = export_peft(model, row, out, compress_to=compress_to)
    asked = ask_vllm([result.serving])
    if as_json:
        show_json(
            {
                "out": str(out),
                "features": active,
                "rank": result.rank,
                "layers": result.layers,
                "error": result.error,
                "vllm": {**result.serving.to_dict(), "differs": asked},
                **idle_json(idle),
            }
        )
        return
    note_idle(idle)
    show(f"exported {told(active)} as a LoRA of rank {result.rank}: {out}")
    show("\n".join([result.message, *(f"note: {note}" for note in asked)]))


def export_all(
    folder: Path,
    base: str | None,
    combinations: Sequence[str],
    out: Path,
    compress_to: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write many compositions as LoRAs, with a map of them, and say how vLLM serves them side by side."""
    adapter = load_adapter(folder)
    rows = parse_combinations(combinations, adapter.config.registry)
    model, _ = load_base(folder, adapter, base, out, force)
    from flix.backends.torch import export_peft_all

    result = export_peft_all(model, rows, out, compress_to=compress_to)
    asked = ask_vllm([lora.export.serving for lora in result.loras])
    acting = {feature for lora in result.loras for feature, _ in lora.composition}
    idle = [feature for feature in untrained(adapter) if feature in acting]
    if as_json:
        show_json({"out": str(out), **result.to_dict(), "differs": asked, **idle_json(idle)})
        return
    note_idle(idle)
    show_table(
        ["LoRA", "features", "rank", "vLLM"],
        [
            [
                lora.name,
                told({written(feature): weight for feature, weight in lora.composition}),
                lora.export.rank,
                "yes" if lora.export.serving.ok else "no",
            ]
            for lora in result.loras
        ],
    )
    show(
        "\n".join([result.message, *(f"note: {note}" for note in asked), f"map: {out / MAP_FILE}"])
    )
