"""Run the tutorials and keep their outputs: ``python -m tests.site.notebooks [NAME ...]``.

What differs from run to run is not kept: times, versions, and what libraries write to standard error.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.site.public import ROOT

FOLDER = ROOT / "docs" / "tutorials"
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}


def tutorials() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def executed(path: Path) -> Any:
    """The notebook after a run in an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, **QUIET, "PYTHONPATH": paths})
    return tidied(notebook)


def tidied(notebook: Any) -> Any:
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = joined(out for out in cell.outputs if out.get("name") != "stderr")
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def joined(outputs: Iterable[Any]) -> list[Any]:
    """Outputs with what was printed in several goes, which depends on the time, in one."""
    found: list[Any] = []
    for out in outputs:
        if found and out.output_type == found[-1].output_type == "stream":
            found[-1].text += out.text
        else:
            found.append(out)
    return found


def main(names: list[str]) -> None:
    import nbformat

    for path in tutorials():
        if not names or path.stem in names:
            print(path.name, flush=True)
            nbformat.write(executed(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
