"""Commands that convert compositions: ``merge`` and ``export``."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from flix.cli.console import quiet, show, show_json, show_table
from flix.cli.features import parse_combinations, parse_features
from flix.cli.folders import check_out
from flix.cli.vllm import ask_vllm
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.composition import composition, untrained, untrained_note
from flix.core.adapter.files import load_adapter
from flix.core.errors import ConfigError
from flix.core.features.names import Feature, written
from flix.core.folders import whole_folder
from flix.core.peft.serving import MAP_FILE
from flix.training.errors import ModelError

_MODEL = (
    "model*.safetensors", "model*.safetensors.index.json", "pytorch_model*", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip


def merge_adapter(
    folder: Path, base: str, features: Sequence[str], out: Path, force: bool, as_json: bool
) -> None:
    """Fold one composition into the base and save a plain transformers folder."""
    model, row, active, idle = _composed(folder, base, features, out, force)
    from flix.backends.torch import merge

    merged = merge(model, row)
    with whole_folder(out, key="config.json", keep=_is_no_model) as aside:
        merged.save_pretrained(aside)
        tokenizer = _copy_tokenizer(base, aside)
    if as_json:
        show_json({"out": str(out), "features": active, "tokenizer": tokenizer, **_idle(idle)})
        return
    _note(idle)
    show(f"merged {_named(active)} into {base}: {out}")
    if not tokenizer:
        show("the base has no tokenizer; none was copied")


def export_adapter(
    folder: Path,
    base: str,
    features: Sequence[str],
    out: Path,
    to: str,
    compress_to: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write one composition as a LoRA that PEFT and vLLM open, and say whether vLLM serves it."""
    _check_format(to)
    model, row, active, idle = _composed(folder, base, features, out, force)
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
                **_idle(idle),
            }
        )
        return
    _note(idle)
    show(f"exported {_named(active)} as a LoRA of rank {result.rank}: {out}")
    show("\n".join([result.message, *(f"note: {note}" for note in asked)]))


def export_all(
    folder: Path,
    base: str,
    combinations: Sequence[str],
    out: Path,
    to: str,
    compress_to: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write many compositions as LoRAs, with a map of them, and say how vLLM serves them side by side."""
    _check_format(to)
    adapter = load_adapter(folder)
    rows = parse_combinations(combinations, adapter.config.registry)
    check_out(out, force, Path(folder), Path(base))
    model = _loaded(adapter, base)
    from flix.backends.torch import export_peft_all

    result = export_peft_all(model, rows, out, compress_to=compress_to)
    asked = ask_vllm([lora.export.serving for lora in result.loras])
    acting = {feature for lora in result.loras for feature, _ in lora.composition}
    idle = [feature for feature in untrained(adapter) if feature in acting]
    if as_json:
        show_json({"out": str(out), **result.to_dict(), "differs": asked, **_idle(idle)})
        return
    _note(idle)
    show_table(
        ["LoRA", "features", "rank", "vLLM"],
        [
            [
                lora.name,
                _named({written(feature): weight for feature, weight in lora.composition}),
                lora.export.rank,
                "yes" if lora.export.serving.ok else "no",
            ]
            for lora in result.loras
        ],
    )
    show(
        "\n".join([result.message, *(f"note: {note}" for note in asked), f"map: {out / MAP_FILE}"])
    )


def _check_format(to: str) -> None:
    if to != "peft":
        raise ConfigError(f"--to: flix exports to peft, got {to!r}")


def _composed(
    folder: Path, base: str, features: Sequence[str], out: Path, force: bool
) -> tuple[Any, Any, dict[str, float], list[Feature]]:
    """The base with the adapter in it, the composition as a row, what it activates, and what of that has no update."""
    adapter = load_adapter(folder)
    row = parse_features(features, adapter.config.registry)
    active = composition(adapter.config, row)
    check_out(out, force, Path(folder), Path(base))
    loaded = _loaded(adapter, base)
    acting = {feature for feature, _ in active}
    idle = [feature for feature in untrained(adapter) if feature in acting]
    return loaded, row, {written(feature): weight for feature, weight in active}, idle


def _loaded(adapter: Adapter, base: str) -> Any:
    """The base with the adapter in it; trained heads come with it."""
    quiet()
    from flix.training.models import load_model, locate

    model = load_model(locate(base), dtype="auto")
    from flix.backends.torch import load_into

    return load_into(model, adapter).eval()


def _idle(features: Sequence[Feature]) -> dict[str, list[str]]:
    return {"never_trained": [written(feature) for feature in features]}


def _note(features: Sequence[Feature]) -> None:
    if features:
        show(f"note: {untrained_note(features)}")


def _copy_tokenizer(base: str, out: Path) -> bool:
    """Save the base's tokenizer beside the merged model, if there is one."""
    from flix.training.models import load_tokenizer, locate

    try:
        tokenizer = load_tokenizer(locate(base))
    except ModelError:
        return False
    tokenizer.save_pretrained(out)
    return True


def _is_no_model(name: str) -> bool:
    """Whether a file is none of what an earlier model of the folder would be read from."""
    return not any(fnmatch(name, pattern) for pattern in _MODEL)


def _named(active: dict[str, float]) -> str:
    return " + ".join(
        name if weight == 1.0 else f"{weight:g} {name}" for name, weight in active.items()
    )
