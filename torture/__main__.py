"""Run the torture, or parts of it, and write the figures.

python -m torture [--parts kills,fuzz,long] [--smoke] [--only NAME,...] [--out torture/out] [--docs docs]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from torture.report import ROOT, commit, write_docs

PARTS = ("kills", "fuzz", "long")
WHOLE: dict[str, dict[str, Any]] = {
    "kills": {"count": 1000, "seconds": 60.0},
    "fuzz": {"count": 100_000},
    "long": {},
}
SMOKE: dict[str, dict[str, Any]] = {
    "kills": {"count": 27, "seconds": 10.0},
    "fuzz": {"count": 1500},
    "long": {"few": True},
}
PACKAGES = (
    "numpy",
    "safetensors",
    "torch",
    "transformers",
    "jax",
    "flax",
    "tensorflow-cpu",
    "keras",
    "peft",
)


def bad(part: str, rows: list[dict[str, Any]]) -> list[str]:
    """What was not as promised, in words."""
    found = []
    for row in rows:
        what = f"{part}: {row['what']}"
        if row.get("wrong"):
            found.append(f"{what}: {row['wrong']}")
        if row.get("left", 0) > 1:
            found.append(f"{what}: {row['left']} files were left")
    return found


def main() -> None:
    """Parse the command line, run, write, and exit with 1 where something was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--only", default="", help="names within the parts")
    parser.add_argument(
        "--smoke", action="store_true", help="minutes, not hours; docs are left alone"
    )
    parser.add_argument("--count", type=int, help="kills together, or inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "torture" / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    for part in options.parts.split(","):
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
        settings = dict((SMOKE if options.smoke else WHOLE)[part])
        if options.count and "count" in settings:
            settings["count"] = options.count
        begun = time.monotonic()
        rows = importlib.import_module(f"torture.{part}").run(
            **settings, only=only, seed=options.seed
        )
        made = {
            "part": part,
            "rows": rows,
            "seconds": round(time.monotonic() - begun),
            "commit": commit(),
            "environment": environment(PACKAGES),
        }
        name = f"{part}-smoke.json" if options.smoke else f"{part}.json"
        (options.out / name).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        wrong += bad(part, rows)
    if not options.smoke:
        write_docs(options.out, options.docs)
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
