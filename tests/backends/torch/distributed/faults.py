"""Workers that are killed: the example's loop under torchrun, which restarts it from the last whole checkpoint.

python -m tests.backends.torch.distributed.faults RUNS

Each run kills one of its processes once (SIGKILL), at a random moment of a step or of a checkpoint, and is held to an
undisturbed run: the same adapter, and the same last checkpoint, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from flix.backends.torch.distributed import last_checkpoint

ROOT = Path(__file__).parents[4]
PLACES = ("step", "checkpoint")
# Restarted workers find those of before in the store that the agent shares with them: torch 2.13 with gloo then fails.
APART = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def example() -> Any:
    """The example as a module."""
    where = ROOT / "examples" / "sharded_loop.py"
    spec = importlib.util.spec_from_file_location("sharded_loop", where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work(folder: str, place: str, rank: str, when: str, part: str) -> None:
    """One process, which is killed if it is the one, and this is its first life.

    Args:
        folder: where the run writes.
        place: "step", "checkpoint" or "none".
        rank: which process.
        when: the number of the step or the checkpoint.
        part: when in it, as a part of the time that the one before took.
    """
    loop = example()
    Path(folder).mkdir(exist_ok=True)
    if place in PLACES and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank == os.environ["RANK"]:  # fmt: skip
        name = {"step": "batch_of", "checkpoint": "save_checkpoint"}[place]
        function, starts = getattr(loop, name), []

        def armed(*args: Any, **kwargs: Any) -> Any:
            starts.append(time.perf_counter())
            if len(starts) == int(when) + 1:
                took = lengths[-1] if place == "checkpoint" else starts[-1] - starts[-2]
                threading.Timer(float(part) * took, end, (Path(folder),)).start()
            result = function(*args, **kwargs)
            lengths.append(time.perf_counter() - starts[-1])
            return result

        lengths: list[float] = []
        setattr(loop, name, armed)
    loop.main(folder)


def end(folder: Path) -> None:
    """Kill this process, with a mark that it was."""
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, *kill: Any, count: int = 2) -> None:
    """A run as torchrun starts it; its agent forks the workers, which then need not import torch anew."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=2, start_method="fork", monitor_interval=0.05,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=folder.name,
    )  # fmt: skip
    os.environ.update(APART)
    elastic_launch(config, work)(str(folder), *map(str, kill or ("none", 0, 0, 0)))


def command(folder: Path, *kill: Any, count: int = 2) -> None:
    """The same by the command."""
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--max-restarts=2",
        "-m", "tests.backends.torch.distributed.faults", str(folder), *map(str, kill),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1", **APART}  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def found(folder: Path) -> dict[str, Any]:
    """Every bit that a run ended with: its adapter's file, and all that its last checkpoint holds."""
    import torch.distributed.checkpoint as dcp

    last = last_checkpoint(folder / "steps")
    assert last is not None and last.name == "step-12", last
    reader = dcp.FileSystemReader(last)
    there = reader.read_metadata().state_dict_metadata
    held = {n: torch.empty(tuple(m.size), dtype=m.properties.dtype) for n, m in there.items()}
    dcp.load(held, storage_reader=reader, no_dist=True)
    return {**held, "adapter": (folder / "adapter" / "flix.safetensors").read_bytes()}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    if one.keys() != two.keys():
        return False
    return all(torch.equal(v, two[n]) if isinstance(v, torch.Tensor) else v == two[n] for n, v in one.items())  # fmt: skip


def kill_of(number: int) -> tuple[Any, ...]:
    """Where the process of a run is killed: in a step or in a checkpoint, in turn."""
    draw, place = random.Random(number), PLACES[number % 2]
    return place, draw.randrange(2), draw.randint(1, 11 if place == "step" else 3), round(draw.random(), 3)  # fmt: skip


def killed(folder: Path) -> bool:
    """Whether a process of a run was killed, and so lived twice."""
    return (folder / "killed").exists()


def main(runs: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        run(Path(place) / "whole")
        whole = found(Path(place) / "whole")
        ended = before = 0
        for number in range(runs):
            start, folder, kill = time.perf_counter(), Path(place) / str(number), kill_of(number)
            run(folder, *kill)
            equal = same(found(folder), whole)
            ended, before = ended + equal, before + killed(folder)
            took = time.perf_counter() - start
            print(f"{number}: {kill} killed={killed(folder)} same={equal} {took:.1f} s", flush=True)
        print(f"{ended} of {runs} ended at the same bits; {before} were killed before their end")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        work(*sys.argv[1:])
    else:
        main(int(sys.argv[1]))
