"""LoRAs from strangers: read, or refused by flix, whatever their two files say."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from flix import AdapterError, FlixError, from_peft
from tests.core.adapter.test_hostile import DEEP, HUGE, VALUES

STEM = "base_model.model."
SETTINGS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {"k": 1}, "bias": "none",
    "alpha_pattern": {"q": 3.5}, "target_modules": ["q", "k"], "base_model_name_or_path": "x", "revision": None,
    "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
}  # fmt: skip
NAMES = ("q.lora_A.weight", "q.lora_B.weight", "k.lora_A.weight", "k.lora_B.weight")
DATA = save(
    {
        f"{STEM}{name}": np.ones((rank, 3) if "A" in name else (3, rank), "f4")
        for name, rank in zip(NAMES, (2, 2, 1, 1), strict=True)
    },
    metadata={"format": "pt"},
)


def write(folder: Path, settings: Any = None, data: bytes = DATA) -> Path:
    text = settings if isinstance(settings, bytes) else json.dumps(settings or SETTINGS).encode()
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def test_what_is_changed_below_is_read(tmp_path: Path) -> None:
    assert set(from_peft({"x": write(tmp_path)}, "g").layers) == {"q", "k"}


@pytest.mark.parametrize(
    "changes",
    [
        {"r": HUGE}, {"lora_alpha": HUGE}, {"alpha_pattern": {"q": HUGE}}, {"rank_pattern": {"k": HUGE}},
        {"alpha_pattern": {"(q+)+": 1}}, {"rank_pattern": {"(k*)*": 1}},
        {"alpha_pattern": {f"x.*{i}": 1 for i in range(10_000)}}, {"rank_pattern": "k"}, {"peft_type": [1]},
        {"alpha_pattern": {"(" * 50_000: 1}}, {"lora_alpha": "4"}, {"use_rslora": "no"}, {"use_rslora": 0},
        {"alpha_pattern": {"q": -1e300}},
    ],
)  # fmt: skip
@pytest.mark.timed
def test_settings_that_do_harm_are_refused(tmp_path: Path, changes: Any) -> None:
    began = time.process_time()
    with pytest.raises(AdapterError):
        from_peft({"x": write(tmp_path, {**SETTINGS, **changes})}, "g")
    assert time.process_time() - began < 5


@pytest.mark.timed
def test_files_that_do_harm_are_refused(tmp_path: Path) -> None:
    for text in (DEEP.encode(), b'{"a":' * 50_000, b"\xff", b'{"r": 1' + b"0" * 5000 + b"}"):
        with pytest.raises(AdapterError, match="is damaged"):
            from_peft({"x": write(tmp_path, text)}, "g")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        write(tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)  # reading it would wait for ever
        with pytest.raises(AdapterError, match="is not a regular file"):
            from_peft({"x": tmp_path}, "g")
        (tmp_path / name).unlink()


def fuzz(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Read LoRAs with random changes to the settings or to the header; how many were read, and how many refused."""
    rng, read = random.Random(seed), 0
    length = int.from_bytes(DATA[:8], "little")
    header, values = json.loads(DATA[8 : 8 + length]), DATA[8 + length :]
    pool = [*VALUES, "(a+)+", ".*", "LORA", "F32", "BF16", "I8", [2, 3], [0, 24], [3, 2], 24]
    for _ in range(count):
        settings, changed = copy.deepcopy(SETTINGS), copy.deepcopy(header)
        node: Any = settings if rng.random() < 0.6 else changed
        while True:
            key = rng.choice(list(node))
            inner = node[key]
            if not isinstance(inner, dict) or not inner or rng.random() < 0.4:
                break
            node = inner
        if rng.random() < 0.8:
            node[key] = rng.choice(pool)
        else:
            node[str(rng.choice(pool))[:30]] = node.pop(key)
        text = json.dumps(changed).encode()
        write(folder, settings, len(text).to_bytes(8, "little") + text + values)
        began = time.process_time()
        try:
            from_peft({"x": folder}, "g")
            read += 1
        except FlixError:
            pass
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {settings} {changed}") from error
        assert time.process_time() - began < 5
    return read, count - read


def test_loras_with_random_changes_are_refused_by_flix_alone(tmp_path: Path) -> None:
    read, refused = fuzz(tmp_path, 0, 2000)
    assert read > 200 and refused > 800
