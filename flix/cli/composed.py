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
from flix.core.features.names import Feature, written


def composed(
    folder: Path, base: str, features: Sequence[str], out: Path, force: bool
) -> tuple[Any, Any, dict[str, float], list[Feature]]:
    """The base with the adapter in it, the composition as a row, what it activates, and what of that has no update."""
    adapter = load_adapter(folder)
    row = parse_features(features, adapter.config.registry)
    active = composition(adapter.config, row)
    check_out(out, force, Path(folder), Path(base))
    loaded = load_base(adapter, base)
    acting = {feature for feature, _ in active}
    idle = [feature for feature in untrained(adapter) if feature in acting]
    return loaded, row, {written(feature): weight for feature, weight in active}, idle


def load_base(adapter: Adapter, base: str) -> Any:
    """The base with the adapter in it; trained heads come with it."""
    quiet()
    from flix.tasks import load_model, locate

    model = load_model(locate(base), dtype="auto")
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
