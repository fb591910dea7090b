"""Tiny local models; nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tasks import encoder, written


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny T5 and Llama, each with a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("writers")
    return {kind: written(root / kind, kind) for kind in ("t5", "llama")}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny encoders, a decoder and an encoder-decoder, each with a tokenizer of word pieces."""
    root = tmp_path_factory.mktemp("encoders")
    kinds = ("bert", "roberta", "distilbert", "llama", "t5")
    return {kind: encoder(root / kind, kind) for kind in kinds}
