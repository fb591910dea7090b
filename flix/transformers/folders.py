"""The folder of a run: who may write it, and what a run that is resumed must go by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flix.core.errors import RunError
from flix.core.files import make_folder, write_file
from flix.core.holding import alone_in
from flix.transformers.checkpoints import last_checkpoint, none_complete
from flix.transformers.journal import line_of, plain

ADAPTER, METRICS, RESOLVED, CHECKPOINTS = "adapter", "metrics.json", "config.yaml", "checkpoints"
LOG, MIXTURE, PREDICTIONS, RUN = "log.jsonl", "mixture.json", "predictions.jsonl", "run.json"
FORMAT = 2
"""Of what ``checkpoints/run.json`` says a run goes by: 1 drew its rows in another order."""


def is_main() -> bool:
    """Whether this process writes: the first of several that ``torchrun`` or ``accelerate launch`` started."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def write_json(path: Path, data: Any) -> None:
    """A JSON file, whole or not at all."""
    text = json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, (text + "\n").encode("utf-8"))


def write_lines(path: Path, entries: Iterable[Any]) -> None:
    """A JSONL file, whole or not at all."""
    write_file(path, "".join(map(line_of, entries)).encode("utf-8", "surrogatepass"))


def claim(output: Path, resume: bool, overwrite: bool) -> tuple[Path | None, list[Path]]:
    """Make sure that the output folder is ours to write.

    Returns:
        The checkpoint to go on from, and what an earlier run left that is to be discarded.

    Raises:
        RunError: it is not, or there is nothing to resume.
    """
    if output.exists() and not output.is_dir():
        raise RunError(f"output: {str(output)!r} is a file")
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other")
    if resume:
        found = last_checkpoint(output / CHECKPOINTS)
        if found is None:
            raise RunError(none_complete(output / CHECKPOINTS, str(output)))
        return found, []
    if not is_main():
        return None, []
    left = (ADAPTER, METRICS, CHECKPOINTS, LOG, MIXTURE, PREDICTIONS, RUN)
    used = [output / name for name in left if (output / name).exists()]
    if used and not overwrite:
        raise RunError(
            f"{str(output)!r} holds a run already; --resume continues it, --overwrite discards it"
        )
    if not used and (output / RESOLVED).exists():
        raise RunError(
            f"{str(output / RESOLVED)!r} belongs to no run, and a run would overwrite it; give "
            f"another output:"
        )
    settings = output / RESOLVED
    return None, [*used, settings] if used and settings.exists() else used


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Hold the output folder while the run writes there. Of several processes of a run, the one that writes holds it.

    Raises:
        RunError: another run does.
    """
    if not is_main():
        yield
        return
    make_folder(output)
    with alone_in(output, "flix train"):
        yield


def begin(output: Path, earlier: Iterable[Path], goes_by: Mapping[str, Any] | None) -> None:
    """Make the folder; what an earlier run left is discarded.

    Args:
        output: the folder.
        earlier: what is discarded.
        goes_by: what the run goes by, to be checked when it is resumed; None for one that is resumed.
    """
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    if goes_by is not None:
        write_json(output / CHECKPOINTS / RUN, goes_by)


def check_same(
    checkpoint: Path,
    now: Mapping[str, Any],
    free: Collection[str],
    read: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Refuse to continue a run under what changes what its steps mean.

    Args:
        checkpoint: to continue from.
        now: what the run would go by: ``format``, ``settings``, ``data`` and ``processes``.
        free: settings that may differ, such as ``"training.steps"``.
        read: the settings that the run started with, as this flix reads them: those that were not there yet have their
            defaults. It raises ValueError for settings that this flix does not know.

    Raises:
        RunError: it would; the first difference is named.
    """
    file = checkpoint.parent / RUN
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file}: cannot be read: {error}") from None
    if isinstance(said, dict) and "datasets" in said:
        raise RunError(
            "cannot resume: the run was started by an earlier flix, which drew its rows in "
            "another order and dropped other "
            "features; --overwrite starts it again, and its checkpoint is an adapter that can be "
            "loaded"
        )
    before = said.get("settings") if isinstance(said, dict) else None
    if not isinstance(before, dict) or not isinstance(before.get("training"), dict):
        raise RunError(f"{file}: holds no settings of a run")
    if said.get("format") != FORMAT:
        raise RunError(f"cannot resume: {file} is of format {said.get('format')!r}, not {FORMAT}")
    # A run of an earlier flix does not name the settings that came after it, and one of a later flix names more.
    try:
        before = read(before)
    except ValueError as error:
        why = " ".join(str(error).split())
        raise RunError(
            f"cannot resume: {file} holds settings that this flix cannot read: {why}"
        ) from None
    for key, was, is_now in _pairs(before, now["settings"]):
        if was != is_now and key not in free:
            raise RunError(f"cannot resume: {key} was {was!r} and is {is_now!r} now")
    if why := changed(said.get("data"), now["data"]):
        raise RunError(
            f"cannot resume: the files of training rows are not those that the run started with: {why}"
        )
    if said.get("processes") != now["processes"]:
        raise RunError(
            f"cannot resume: the run started in {said.get('processes')} processes and would "
            f"continue in {now['processes']}"
        )


def changed(before: Any, now: Sequence[Mapping[str, Any]]) -> str:
    """How files differ from what they were; empty if they do not. What was not noted then counts as unchanged.

    Args:
        before: what was noted of each file; of an earlier flix its digest alone, or None.
        now: ``name``, ``features`` (of its name), ``bytes``, ``modified``, ``sha256`` and ``state`` of each, as far as
            they are known.
    """
    if not isinstance(before, list) or len(before) != len(now):
        return f"there are {len(now)} now" + (f", not {len(before)}" if isinstance(before, list) else "")  # fmt: skip
    for was, one in zip(before, now, strict=True):
        noted = was if isinstance(was, dict) else {"sha256": was}
        for key, said in _NOTED.items():
            mine = one.get(key, {} if key == "features" else None)
            if noted.get(key) is not None and mine is not None and noted[key] != mine:
                return f"{one['name']} {said.format(noted[key], mine)}"
    return ""


_NOTED = {
    "name": "was {0}",
    "features": "stood for the features {0} and stands for {1} now",
    "bytes": "had {0} bytes and has {1} now",
    "sha256": "has another content",
    "state": "has another content",
    "modified": "was written since; a stream is known by its files' sizes and times, which cp -p keeps",
}


def seconds_before(output: Path, step: int) -> float:
    """How long a run had trained when it was done with a step, as far as it says so."""
    try:
        said = json.loads((output / RUN).read_text(encoding="utf-8"))
        return float(said["seconds"]) if 0 < said["steps"] <= step else 0.0
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0


def _pairs(before: dict[str, Any], now: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    for key in now:
        if key != "training":
            yield key, before.get(key), now[key]
    for key in now["training"]:
        yield f"training.{key}", before["training"].get(key), now["training"][key]
