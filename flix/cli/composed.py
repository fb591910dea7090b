"""What ``merge`` and ``export`` share: a base with an adapter in it, and how a composition is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flix.cli.console import quiet, show
from flix.cli.features import parse_features
from flix.cli.folders import check_out
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.composition import composition, untrained, untrained_note
from flix.core.adapter.files import load_adapter
from flix.core.errors import AdapterError, listed
from flix.core.features.names import Feature, written
from flix.tasks.making import GENERATIVE
from flix.tasks.recipe import read_recipe


def composed(
    folder: Path,
    base: str,
    features: Sequence[str],
    out: Path,
    force: bool,
    dtype: str = "auto",
) -> tuple[Any, Any, dict[str, float], list[Feature]]:
    """The base with the adapter in it, the composition as a row, what it activates, and what of that has no update."""
    adapter = load_adapter(folder)
    _refuse_heads(folder)
    row = parse_features(features, adapter.config.registry)
    active = composition(adapter.config, row)
    check_out(out, force, Path(folder), Path(base))
    loaded = load_base(adapter, base, dtype)
    acting = {feature for feature, _ in active}
    idle = [feature for feature in untrained(adapter) if feature in acting]
    return loaded, row, {written(feature): weight for feature, weight in active}, idle


def _refuse_heads(folder: Path) -> None:
    """Refuse an adapter of ``flix train`` whose tasks have heads: no file of transformers or PEFT holds their model."""
    recipe = read_recipe(folder)
    headed = [t["name"] for t in (recipe or {}).get("tasks", ()) if t["kind"] not in GENERATIVE]
    if headed:
        raise AdapterError(
            f"{str(folder)!r} answers with heads of its own, for {listed(headed)}; transformers and PEFT have no model with "
            "these. In Python, merge(flix.tasks.load_pretrained(folder), row) is a plain model of one composition, and "
            "export_peft gives a LoRA for it"
        )


def load_base(adapter: Adapter, base: str, dtype: str = "auto") -> Any:
    """The base with the adapter in it; trained heads come with it. ``"auto"`` keeps the dtype of its file."""
    quiet()
    from flix.tasks import load_model, locate

    model = load_model(locate(base), dtype=dtype)
    from flix.backends.torch import load_into

    return load_into(model, adapter).eval()


def idle_json(features: Sequence[Feature]) -> dict[str, list[str]]:
    """Features without an update, as JSON has them."""
    return {"never_trained": [written(feature) for feature in features]}


def note_idle(features: Sequence[Feature]) -> None:
    """Say which features of a composition have no update."""
    if features:
        show(f"note: {untrained_note(features)}")


def told(active: Mapping[str, float]) -> str:
    """A composition in a line."""
    return " + ".join(
        name if weight == 1.0 else f"{weight:g} {name}" for name, weight in active.items()
    )
