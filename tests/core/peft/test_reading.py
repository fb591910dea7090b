"""A LoRA's two files: what is no file, what cannot be read, and what another program does to them meanwhile."""

from __future__ import annotations

import os

import pytest

from flix import AdapterError, from_peft
from flix.core.config import overrides
from flix.core.peft import reading
from flix.core.peft.reading import read_peft
from tests.core.peft.test_importing import folder, pairs, same


def test_files_that_are_no_files_are_refused(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder(tmp_path / name)
        (path / name).unlink()
        os.mkfifo(path / name)  # reading it would wait for ever
        with pytest.raises(AdapterError, match=f"{name}' is not a regular file"):
            read_peft(path)
        (path / name).unlink()
        (path / name).mkdir()
        with pytest.raises(AdapterError, match=f"{name}' (is not a regular file|cannot be read)"):
            read_peft(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = folder(tmp_path / "l")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).rename(path / "aside")
        (path / name).symlink_to(name)
        with pytest.raises(AdapterError, match=f"{name}' cannot be read: .*Too many levels"):
            read_peft(path)
        (path / name).unlink()
        (path / "aside").rename(path / name)


def test_where_folders_cannot_be_held_files_are_read_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "supports_dir_fd", set())
    path = folder(tmp_path / "l")
    same(from_peft({"x": path}, "task"), read_peft(path), ("task", "x"))
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        read_peft(path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"it has no adapter_config\.json"):
        read_peft(path)


def test_a_folder_that_loses_a_file_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """A folder that another took the place of is read anew; one that lost a file has none to read."""
    path = folder(tmp_path / "l")
    real = reading._is_there

    def lost(*arguments):
        found = real(*arguments)
        (path / arguments[-1]).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(reading, "_is_there", lost)
    with pytest.raises(AdapterError, match="l' lost a file while it was read"):
        read_peft(path)


def test_patterns_that_take_long_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(overrides, "_MOST_TRIED", 2)
    path = folder(tmp_path / "l", alpha_pattern={"x.*y": 1})
    with pytest.raises(AdapterError, match=r"adapter_config\.json': .* has 1 patterns, which are too many"):  # fmt: skip
        read_peft(path)


def test_a_bare_parameter_that_is_one_matrix_is_no_layer(tmp_path):
    path = folder(tmp_path / "l", pairs({"a.q": 4}), r=2, rank_pattern={"weight": 4}, target_parameters=["a.q.weight"])  # fmt: skip
    with pytest.raises(AdapterError, match=r"layer 'a\.q\.weight' is no kernel with an axis of experts, but one matrix, and bare"):  # fmt: skip
        read_peft(path)
