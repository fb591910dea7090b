"""What ``merge`` and ``export`` share: a base with an adapter in it, and how a composition is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flix.cli.console import quiet, show
from flix.cli.features import parse_features
from flix.cli.folders import check_out
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.base import differing
from flix.core.adapter.composition import composition, untrained, untrained_note
from flix.core.adapter.files import load_adapter
from flix.core.errors import AdapterError, listed
from flix.core.features.names import Feature, written
from flix.tasks.making import GENERATIVE
from flix.tasks.recipe import read_recipe


def composed(
    folder: Path,
    base: str | None,
    features: Sequence[str],
    out: Path,
    force: bool,
    dtype: str = "auto",
) -> tuple[Any, str, Any, dict[str, float], list[Feature]]:
    """The base with the adapter in it, where the base is, the composition as a row, what it activates, and what of that
    has no update."""
    adapter = load_adapter(folder)
    _refuse_heads(folder)
    row = parse_features(features, adapter.config.registry)
    active = composition(adapter.config, row)
    loaded, place = load_base(folder, adapter, base, out, force, dtype)
    acting = {feature for feature, _ in active}
    idle = [feature for feature in untrained(adapter) if feature in acting]
    return loaded, place, row, {written(feature): weight for feature, weight in active}, idle


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


def load_base(
    folder: Path, adapter: Adapter, base: str | None, out: Path, force: bool, dtype: str = "auto"
) -> tuple[Any, str]:
    """The base with the adapter and its heads in it, and where it is. ``"auto"`` keeps the dtype of its file."""
    quiet()
    from flix.tasks import load_model
    from flix.tasks.pretrained import base_place

    place, commit = base_place(folder, base)
    check_out(out, force, Path(folder), Path(place))
    model = load_model(place, dtype=dtype, revision=commit)
    from flix.backends.torch import verbs

    verbs.check_fits(adapter, model)
    # A base that was named is taken with a warning; one that is only looked for must be what it was.
    if base is None and (said := differing(adapter.base, verbs.base_of(model, adapter.layers))):
        raise AdapterError(f"{said}; --base names another place to look for it")
    return verbs.load_into(model, adapter).eval(), place


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
