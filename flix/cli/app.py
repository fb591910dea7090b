"""The commands and their options. What they do is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flix._version import __version__
from flix.cli.console import fail, guarded

app = typer.Typer(
    name="flix",
    help="FLix: featurized low-rank mixtures. One pretrained model, many tasks in many languages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")
]
AdapterFolder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")]
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A training configuration, YAML.")
]
Base = Annotated[
    str, typer.Option("--base", metavar="MODEL", help="The base model: folder or hub name.")
]
FeaturesOption = Annotated[
    list[str],
    typer.Option(
        "--features",
        metavar="GROUP=NAME,...",
        help="The composition, e.g. language=hau,task=ner; language=hau:0.5+swa:0.5 mixes.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"flix {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """FLix: featurized low-rank mixtures. One pretrained model, many tasks in many languages."""


@app.command()
@guarded
def quickstart(
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Repeat with so many seeds.")] = 1,
    fast: Annotated[
        bool, typer.Option("--fast", help="A short run that only shows that all works.")
    ] = False,
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results go.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=10**9, help="Training steps.")] = None,
) -> None:
    """Train FLix and two LoRAs on real multilingual data, and compare them."""
    from flix.cli.running import run_quickstart

    run_quickstart(seeds, fast, as_json, out, steps)


@app.command()
@guarded
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
    from flix.cli.looking import show_plan
    from flix.core.strategy.explain import Batch

    show_plan(config, as_json, Batch(batch_size, length, device) if explain else None)


@app.command()
@guarded
def train(
    config: ConfigFile,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an earlier run in the output folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as a configuration says."""
    from flix.cli.running import train_config

    train_config(config, resume, overwrite, as_json)


@app.command()
@guarded
def evaluate(
    config: ConfigFile,
    adapter: AdapterFolder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the results as JSON too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate an adapter by generation, seen and held-out combinations apart."""
    from flix.cli.running import evaluate_adapter

    evaluate_adapter(config, adapter, out, as_json)


@app.command()
@guarded
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
    from flix.cli.looking import check_adapter, inspect_adapter

    if check:
        raise typer.Exit(check_adapter(adapter, as_json))
    inspect_adapter(adapter, layers, as_json)


@app.command()
@guarded
def merge(
    adapter: AdapterFolder,
    base: Base,
    features: FeaturesOption,
    out: Out,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fold one composition into the base: a plain transformers folder."""
    from flix.cli.converting import merge_adapter

    merge_adapter(adapter, base, features, out, force, as_json)


@app.command()
@guarded
def export(
    adapter: AdapterFolder,
    base: Base,
    out: Out,
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
    from flix.cli.converting import export_adapter, export_all

    if (features is None) == (everything is None):
        fail("give --features for one composition, or --all for many")
    if everything is not None:
        export_all(adapter, base, everything, out, to, compress_to, force, as_json)
    else:
        export_adapter(adapter, base, features or [], out, to, compress_to, force, as_json)


@app.command("import")
@guarded
def import_(
    loras: Annotated[
        list[str],
        typer.Argument(metavar="NAME=FOLDER...", help="A LoRA's folder, and its feature's name."),
    ],
    group: Annotated[str, typer.Option("--group", help="The group that they become.")],
    out: Out,
    source: Annotated[str, typer.Option("--from", help="The format: peft.")] = "peft",
    skip_modules: Annotated[
        bool,
        typer.Option("--skip-modules", help="Leave out whole modules that were trained beside."),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of LoRAs that PEFT wrote: each becomes a feature, together they are a group."""
    from flix.cli.sharing import import_folders

    import_folders(loras, group, out, source, skip_modules, force, as_json)


@app.command()
@guarded
def share(
    adapter: AdapterFolder,
    features: Annotated[
        list[str],
        typer.Option("--features", metavar="GROUP=NAME,...", help="The features to share."),
    ],
    out: Out,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write some features, and what they imply, as an adapter of their own."""
    from flix.cli.sharing import share_features

    share_features(adapter, features, out, force, as_json)


@app.command()
@guarded
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Two adapters' folders or more.")
    ],
    out: Out,
    conflicts: Annotated[
        str,
        typer.Option(
            "--conflicts",
            help="What counts where a feature differs: error, keep (the earlier) or replace (the later).",
        ),
    ] = "error",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Put the features of several adapters together as one."""
    from flix.cli.sharing import combine_folders

    combine_folders(adapters, out, conflicts, force, as_json)


@app.command()
@guarded
def backends(as_json: Json = False) -> None:
    """List the backends, and which are installed."""
    from flix.cli.looking import list_backends

    list_backends(as_json)
