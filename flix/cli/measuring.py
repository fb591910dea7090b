"""The command ``bench calibrate``."""

from __future__ import annotations

import datetime
import importlib
import json
import platform
from pathlib import Path

from flix import backends
from flix.cli.console import show, show_json, show_table
from flix.core.errors import ConfigError
from flix.core.strategy.calibrate import calibrate
from flix.core.strategy.decide import PLANNED, TERMS, read_calibrations, user_table


def run_calibration(
    backend: str, out: Path | None, small: bool, threads: int | None, as_json: bool
) -> None:
    """Measure one backend on this machine, and write what came out beside what the table has of others."""
    module = backends.get(backend)
    name = f"{module.__name__}.calibration"
    try:
        lent = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"backend {backend!r} cannot be calibrated: it has no module {name}"
        ) from None
    device = lent.device_class()
    used = lent.use_threads(threads)
    where = f"{datetime.date.today()}, {platform.machine()} {platform.system()}, {used}"
    path = out or user_table()
    others = read_calibrations(path) if path.exists() else {}
    found = calibrate(device, lent.make, measured=where, small=small)
    table = {name: c.to_dict() for name, c in {**others, device: found}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if as_json:
        show_json({"file": str(path), "device": device, **found.to_dict()})
        return
    show_table(
        ["strategy", *TERMS],
        [[s, *(f"{c:.2e}" for c in found.seconds[s])] for s in PLANNED],
        title=f"{device}: seconds for each {', '.join(TERMS)}",
    )
    show(f"written to {path}")
