"""Public names without a whole type: ``python -m tools.types`` (``make types``), by ``pyright --verifytypes flix``.

A checker reads the types of an installed package from its annotations alone. What lacks one is a guess that every
checker makes in its own way. Public are the names of tests/packaging/public.txt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LISTED = ROOT / "tests" / "packaging" / "public.txt"
KERAS = "Keras tells checkers nothing of its layers and models, which these are"
KNOWN = {
    **dict.fromkeys(
        (
            f"flix.backends.{backend}.{name}"
            for backend in ("keras", "tensorflow")
            for name in ("FlixDense", "FlixEinsumDense", "FlixEmbedding", "FlixModel")
        ),
        KERAS,
    ),
    **dict.fromkeys(
        (f"flix.backends.jax.{name}" for name in ("FlixEinsum", "FlixLinear", "FlixLinearGeneral")),
        "the kernel is a descriptor over flax's own attribute",
    ),
    "flix.backends.jax.FlixOptimizer": "nnx.Optimizer is generic in what nothing names",
    "flix.data.Mixture": "datasets' own types are not whole",
    **dict.fromkeys(
        ("flix.transformers.FlixTrainer", "flix.transformers.FlixTrainerMixin"),
        "transformers' Trainer has a metaclass that checkers do not see",
    ),
    "flix.transformers.FlixSeq2SeqTrainer": "transformers' Trainer has a metaclass that checkers do not see",
    **dict.fromkeys(
        (f"flix.training.{name}" for name in ("Settings", "evaluate", "read_settings", "train")),
        "pydantic declares model_config in a way that checkers take for ambiguous",
    ),
}
"""Names that lack a whole type because of another package, each with the reason."""


def public(text: str) -> set[str]:
    """The names in the list of what is public."""
    return {re.sub(r"\(.*", "", line) for line in text.splitlines() if line.startswith("flix.")}


def unknown(report: Mapping[str, Any], names: set[str]) -> dict[str, str]:
    """Those of the names whose type pyright does not know as a whole, with what it says."""
    return {
        symbol["name"]: "; ".join(said["message"].splitlines()[0] for said in symbol["diagnostics"])
        for symbol in report["typeCompleteness"]["symbols"]
        if symbol["name"] in names and not symbol["isTypeKnown"]
    }


def judged(found: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    """What is wrong: names that are new among them, and reasons that no name needs any more."""
    new = [f"{name}: {said or 'a part of it has no whole type'}" for name, said in found.items()]
    new = [line for line in new if line.partition(":")[0] not in known]
    return new + [f"{name}: known, take it off the list" for name in known if name not in found]


def main() -> None:
    """Ends with an error where a public name lacks a whole type and is not on the list."""
    command = ["pyright", "--verifytypes", "flix", "--ignoreexternal", "--outputjson"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not made.stdout.startswith("{"):
        sys.exit(f"pyright did not run: {made.stderr or made.stdout}")
    names = public(LISTED.read_text(encoding="utf-8"))
    found = unknown(json.loads(made.stdout), names)
    if wrong := judged(found, KNOWN):
        sys.exit("\n".join(wrong))
    print(f"{len(names)} public names; {len(found)} lack a whole type because of other packages")


if __name__ == "__main__":
    main()
