"""What ``share``, ``combine`` and ``import`` end with: the adapter that they write. None loads a framework."""

from __future__ import annotations

from pathlib import Path

from flix.cli.console import show, show_json
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.files import save_new_adapter
from flix.core.features.names import written


def write_adapter(adapter: Adapter, out: Path, as_json: bool, what: str, heads: list[str]) -> None:
    """Save an adapter and say what is in it.

    Args:
        adapter: the adapter.
        out: where it goes.
        as_json: whether that is said as JSON.
        what: what was done with its features: "shared".
        heads: folders whose trained heads were left out.
    """
    save_new_adapter(adapter, out)
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
