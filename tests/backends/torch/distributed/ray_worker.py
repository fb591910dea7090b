"""The example of Ray Train, with a worker that dies; and the same loop in two plain processes. Started by test_ray.py.

python -m tests.backends.torch.distributed.ray_worker {ray|plain} FOLDER
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[4]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("ray_train", ROOT / "examples" / "ray_train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dying(settings: dict[str, Any]) -> None:
    """The loop, whose second worker is killed once, when the others wait for it to write the second checkpoint."""
    import torch.distributed as dist

    module, killed = example(), Path(settings["folder"]) / "killed"
    save_checkpoint = module.distributed.save_checkpoint

    def save(folder: Any, model: Any, optimizer: Any, step: int, **settings: Any) -> Any:
        if step == 6 and dist.get_rank() == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return save_checkpoint(folder, model, optimizer, step, **settings)

    module.distributed.save_checkpoint = save
    module.loop(settings)


def plain(folder: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    module = example()
    module.ray.train.report = lambda *_, **__: None
    module.loop({"folder": folder, "steps": 9})


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        plain(sys.argv[2])
    else:
        from tests.backends.torch.distributed.ray_worker import dying as run  # by its name

        example().main(sys.argv[2], run=run)
