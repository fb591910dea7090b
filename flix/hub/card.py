"""The card of an adapter on a hub: what it is made of, how it is loaded, and what a run measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.described import Base
from flix.core.config.config import FlixConfig
from flix.core.costs import feature_cost
from flix.core.features.names import written

_CODE = re.compile(r"[a-z]{2,3}")
_HUB = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def card(
    name: str,
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    base: Base | None = None,
    run: Mapping[str, Any] | None = None,
) -> str:
    """The card, as Markdown with the header that hubs read.

    Args:
        name: ``org/name``.
        config: the adapter's configuration.
        layers: the layers that it adapts.
        base: what is known about the base.
        run: what a run measured, as in ``metrics.json``.
    """
    live, known = config.registry.live, base.name if base is not None and base.name else None
    on = f"`{known}`" if known else "a base that it does not name"
    groups = ", ".join(
        f"{sum(f[0] == group for f in live)} of the group `{group}`"
        for group in config.registry.groups
    )
    row = json.dumps({f[0]: f[1] for f in reversed(live)}, ensure_ascii=False)
    parts = [
        _header(config, known),
        f"# {name}",
        f"An adapter for {on}, made with flix: {len(live)} features ({groups}), each with a low-rank update of its own in "
        f"{len(layers)} layers. A row of a batch runs under the features that it names (FLix, arXiv 2402.17934).",
        "## Use",
        f"```python\n{_loaded(name, known)}\n"
        f"ids = model.flix_config.registry.encode([{row}])\n"
        "model(**batch, flix_features=ids)  # a batch of one row\n```",
        "## Features",
        _table(
            ("feature", "rank", "parameters", "implies"),
            [
                (
                    written(f),
                    config.ranks[f],  # type: ignore[index]
                    f"{feature_cost(config, layers, f).parameters:,}",
                    " ".join(map(written, _implied(config, f))),
                )
                for f in live
            ],
        ),
        *_scores(run),
    ]
    return "\n\n".join(parts) + "\n"


def _loaded(name: str, base: str | None) -> str:
    if base and _HUB.fullmatch(base):
        return f"from flix.tasks import load_pretrained\n\nmodel = load_pretrained({name!r})  # on {base}"
    return f"from flix.backends.torch import load\n\nmodel = load(base, {name!r})"


def _header(config: FlixConfig, base: str | None) -> str:
    """YAML, of which JSON is a part."""
    facts: dict[str, Any] = {"library_name": "flix", "tags": ["flix", "adapter", "lora"]}
    if base and _HUB.fullmatch(base):
        facts["base_model"] = base
    codes = [n for g in config.registry.groups if g in ("language", "languages") for n in config.registry.names(g)]  # fmt: skip
    if codes := [code for code in codes if _CODE.fullmatch(code)]:
        facts["language"] = codes
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    return "\n".join(["---", *lines, "---"])


def _implied(config: FlixConfig, feature: tuple[str, str]) -> list[tuple[str, str]]:
    registry = config.registry
    return [registry.features[i] for i in registry.implied(registry.id(*feature)) if registry.features[i] != feature]  # fmt: skip


def _scores(run: Mapping[str, Any] | None) -> list[str]:
    cells = [cell for cell in (run or {}).get("cells") or () if "metric" in cell]
    if not cells:
        return []
    rows = [
        (
            c["cell"],
            "yes" if c["seen"] else "no",
            c["rows"],
            c["metric"],
            _number(c["score"]),
            _span(c),
        )
        for c in cells
    ]
    names = ("combination", "trained", "rows", "measure", "score", "95 %")
    steps = ((run or {}).get("training") or {}).get("steps")
    said = [] if steps is None else [f"After {steps} steps."]
    return ["## Scores", *said, _table(names, rows)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _span(cell: Mapping[str, Any]) -> str:
    low, high = cell.get("interval") or (None, None)
    return "-" if low is None else f"{_number(low)} to {_number(high)}"


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
