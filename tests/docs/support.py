"""Write the table {architecture x feature} of docs/support.md from what the tests claim to cover.

    python -m tests.docs.support            # rewrite the generated blocks
    python -m tests.docs.support --check    # exit with 1 and a diff where they are not what the tests claim

A claim is a mark ``covers(architecture, feature, backend=...)`` on a test that is collected and will run: tests marked
``skip`` or ``xfail`` claim nothing, nor do those whose ``skipif`` holds. A section of the document stands between
``<!-- generated: BACKEND -->`` and ``<!-- end: BACKEND -->``; tests of a backend are collected only where it has one.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.claims import MARKER
from tests.helpers.zoo import ZOO

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "support.md"
COVERED, INAPPLICABLE, UNTESTED = "✓", "–", " "

Claim = tuple[str, str, str]
"""(backend, architecture, feature)."""


@dataclass(frozen=True)
class Section:
    """A backend's part of the document.

    Attributes:
        paths: where its tests are, from the root of the repository.
        architectures: labels of the rows by the names that tests use, in order.
        tables: title, and labels of the columns by the names that tests use, in order.
        applies: whether a feature is something that an architecture can have.
    """

    paths: Sequence[str]
    architectures: dict[str, str]
    tables: Sequence[tuple[str, dict[str, str]]]
    applies: Callable[[str, str], bool] = field(default=lambda architecture, feature: True)


_GENERATION = {
    "greedy": "greedy",
    "beams": "beams",
    "sampling": "sampling",
    "static cache": "static cache",
    "padding": "padded prompts",
    "prompt lookup": "prompt lookup",
}
_PIPELINES = (
    "text-generation",
    "fill-mask",
    "feature-extraction",
    "text-classification",
    "token-classification",
)


def _torch_applies(architecture: str, feature: str) -> bool:
    made = ZOO[architecture]
    if feature in _PIPELINES:
        return feature in made.heads
    if feature in _GENERATION:
        return made.kind != "encoder"
    # The ids of a position would mean another one in the decoder.
    return not (feature == "per-token routing" and made.kind == "encoder-decoder")


_LIFE = {
    "add a feature": "add a feature",
    "remove": "remove",
    "rename": "rename",
    "share a feature": "a feature's own file",
    "disable": "`disable`",
    "import from PEFT": "LoRA files of PEFT",
}


def _jax_applies(architecture: str, feature: str) -> bool:
    # Without a bank the functions are the base: there is nothing to switch.
    return (architecture, feature) != ("pytree", "disable")


_BASES = {
    "torchao-int8": "torchao, int8 weights",
    "torchao-float8": "torchao, float8 weights",
    "torchao-intx": "torchao, weights of few bits",
    "bitsandbytes-8": "bitsandbytes, 8 bit",
    "bitsandbytes-4": "bitsandbytes, 4 bit",
    "gptq": "GPTQ and its kin, by their class",
    "subclass": "subclasses of `nn.Linear` (Falcon's)",
    "doubled": "those that scale",
    "clipped": "those that clip",
    "dispatched": "`dispatch_model`",
    "on_the_host": "`cpu_offload`",
    "on_disk": "`disk_offload`",
    "meta": "meta device",
}


_MEDIA = {
    "vit": "ViT",
    "dinov2": "DINOv2",
    "swin": "Swin",
    "swinv2": "Swin v2, without its position biases",
    "convnext": "ConvNeXt, its linear layers",
    "sam": "SAM",
    "timesformer": "TimeSformer",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "llava": "LLaVA",
    "wav2vec2": "wav2vec 2.0",
    "hubert": "HuBERT",
    "wavlm": "WavLM, without its attention",
    "ast": "Audio Spectrogram Transformer",
    "whisper": "Whisper",
}


def _media_applies(name: str, feature: str) -> bool:
    return (name, feature) != ("convnext", "checkpointing")


def _base_applies(base: str, feature: str) -> bool:
    if feature == "dequantized":
        return "-" in base or base in ("gptq", "doubled")
    if feature == "before":
        return base in ("dispatched", "on_the_host", "on_disk", "meta")
    return feature != "gradients" or base != "meta"


SECTIONS: dict[str, Section] = {
    "torch": Section(
        paths=("tests/backends/torch",),
        architectures={
            "gpt2": "GPT-2 (Conv1D)",
            "llama": "Llama",
            "mistral": "Mistral",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
            "gemma2": "Gemma 2",
            "gemma3": "Gemma 3 (text)",
            "mixtral": "Mixtral (experts)",
            "qwen3-moe": "Qwen3-MoE (experts)",
            "gpt-oss": "GPT-OSS (experts)",
            "deepseek-v3": "DeepSeek-V3 (experts)",
            "t5": "T5",
            "mt5": "mT5",
            "byt5": "ByT5",
            "bart": "BART",
            "bert": "BERT",
            "xlm-r": "XLM-R",
            "minilm": "all-MiniLM-L6-v2 (its real weights)",
        },
        tables=(
            (
                "Forward and training",
                {
                    "mixed batch": "mixed batch",
                    "gradients": "gradients",
                    "per-token routing": "per token",
                    "embeddings": "embeddings",
                    "routed": "`routed`",
                    "checkpointing": "checkpointing",
                    "torch.compile": "`torch.compile`",
                },
            ),
            ("Files", {"save and load": "save, load", "merge": "merge", "PEFT": "export to PEFT"}),
            (
                "Life",
                {
                    "share a feature": "a feature's own file",
                    "disable": "`disable`",
                    "merge in place": "`merge_in_place`, `unmerge`",
                },
            ),
            ("Generation", _GENERATION),
            ("Pipelines", {task: f"`{task}`" for task in _PIPELINES}),
        ),
        applies=_torch_applies,
    ),
    "bases": Section(
        paths=("tests/backends/torch/test_around.py", "tests/backends/torch/test_placed.py"),
        architectures=_BASES,
        tables=(
            (
                "Base",
                {
                    "mixed batch": "mixed batch",
                    "gradients": "gradients",
                    "save and load": "save, load",
                    "before": "placed before `load`",
                    "merge": "`merge`",
                    "dequantized": "`merge(dequantize=True)`",
                },
            ),
        ),
        applies=_base_applies,
    ),
    "media": Section(
        paths=(
            "tests/backends/torch/architectures/test_media.py",
            "tests/backends/torch/test_convolutions.py",
        ),
        architectures=_MEDIA,
        tables=(
            (
                "Model",
                {
                    "mixed batch": "mixed batch",
                    "gradients": "gradients",
                    "routed": "`routed`",
                    "convolutions": "its convolutions",
                    "checkpointing": "checkpointing",
                    "torch.compile": "`torch.compile`",
                    "save and load": "save, load",
                    "merge": "`merge`",
                    "PEFT": "export to PEFT",
                },
            ),
        ),
        applies=_media_applies,
    ),
    "jax": Section(
        paths=("tests/backends/jax", "tests/backends/test_files.py"),
        architectures={
            "nnx": "flax.nnx: Linear, LinearGeneral, Einsum, Embed",
            "stacks": "flax.nnx: layers stacked for `nnx.scan`",
            "bert": "BERT in flax.nnx, a twin of transformers'",
            "pytree": "pure functions over a pytree (linen and others)",
        },
        tables=(
            (
                "Training and files",
                {
                    "mixed batch": "mixed batch",
                    "gradients": "gradients",
                    "per-token routing": "per token",
                    "absent features": "absent features keep their bits",
                    "resume": "Orbax resume",
                    "save and load": "save, load",
                    "merge": "merge",
                    "export": "`jax.export`",
                },
            ),
            ("Life", _LIFE),
        ),
        applies=_jax_applies,
    ),
    "jax-bases": Section(
        paths=("tests/backends/jax/test_around.py",),
        architectures={
            "int8": "a subclass of `nnx.Linear`: int8, a scale for each output",
            "int4": "a module of its own: int4, scales of blocks",
            "float8": "a subclass of `nnx.Linear`: float8",
            "embed": "a subclass of `nnx.Embed`: int8",
            "subclass": "other subclasses of `nnx.Linear`",
            "doubled": "those that scale",
            "clipped": "those that clip",
        },
        tables=(
            (
                "Layer",
                {
                    "mixed batch": "mixed batch",
                    "gradients": "gradients",
                    "save and load": "save, load",
                    "merge": "`merge`",
                    "dequantized": "`merge(dequantize=True)`",
                },
            ),
        ),
        applies=lambda layer, feature: (layer, feature) != ("subclass", "dequantized"),
    ),
    "keras-bases": Section(
        paths=("tests/backends/tensorflow/test_quantised.py",),
        architectures={
            "int8": '`quantize("int8")`',
            "int4": '`quantize("int4")`, a scale for some rows',
            "int4 by channel": "four bits, a scale for each output",
            "float8": '`quantize("float8")`',
        },
        tables=(
            (
                "Base",
                {
                    "mixed batch": "mixed batch",
                    "gradients": "gradients",
                    "save and load": "save, load",
                    "keras file": "`.keras`",
                    "export": "SavedModel",
                    "dequantized": "`merge(dequantize=True)`",
                },
            ),
        ),
    ),
    "tensorflow": Section(
        paths=("tests/backends/tensorflow", "tests/backends/test_files.py"),
        architectures={
            "functional": "functional",
            "sequential": "sequential",
            "subclassed": "subclassed",
            "bert": "BERT in Keras, a twin of transformers'",
        },
        tables=(
            (
                "Training and files",
                {
                    "mixed batch": "mixed batch",
                    "per-token routing": "per token",
                    "resume": "resume in `fit`",
                    "save and load": "save, load",
                    "merge": "merge",
                    "keras file": "`.keras`",
                    "export": "SavedModel",
                },
            ),
            ("Life", _LIFE),
        ),
    ),
}


class Collector:
    """A pytest plugin that keeps what the collected tests claim."""

    def __init__(self) -> None:
        self.claims: set[Claim] = set()

    def pytest_configure(self, config: Any) -> None:
        config.addinivalue_line("markers", MARKER)

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            if not _will_run(item):
                continue
            for mark in item.iter_markers("covers"):
                architecture, feature = mark.args
                self.claims.add((mark.kwargs.get("backend", "torch"), architecture, feature))


def _will_run(item: Any) -> bool:
    marks = [*item.iter_markers()]
    if any(mark.name in ("skip", "xfail") for mark in marks):
        return False
    # A condition given as text is taken to hold: better a cell too few than one too many.
    conditions = (mark.args[0] for mark in marks if mark.name == "skipif" and mark.args)
    return not any(isinstance(condition, str) or condition for condition in conditions)


def collect(paths: Iterable[Path]) -> set[Claim]:
    """What the tests under some paths claim.

    Raises:
        RuntimeError: the tests cannot be collected.
    """
    collector = Collector()
    arguments = ["--collect-only", "-qqq", *map(str, paths)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = pytest.main(arguments, plugins=[collector])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"the tests cannot be collected ({status!r}):\n{said.getvalue()}")
    return collector.claims


def render(section: Section, claims: set[tuple[str, str]]) -> str:
    """A section's tables, one line for an architecture that has any cell there.

    Args:
        section: its rows and columns.
        claims: (architecture, feature) pairs that tests cover.

    Raises:
        ValueError: a claim that names no row or column, or a cell that does not apply.
    """
    features = {name for _, columns in section.tables for name in columns}
    for architecture, feature in sorted(claims):
        if architecture not in section.architectures or feature not in features:
            raise ValueError(f"a test claims {architecture!r} x {feature!r}: no such row or column")
        if not section.applies(architecture, feature):
            raise ValueError(f"a test claims {architecture!r} x {feature!r}: marked inapplicable")
    parts = []
    for title, columns in section.tables:
        lines = [
            f"| {title} | {' | '.join(columns.values())} |",
            f"|---|{':-:|' * len(columns)}",
        ]
        for name, label in section.architectures.items():
            if not any(section.applies(name, feature) for feature in columns):
                continue
            cells = [_cell(section, claims, name, feature) for feature in columns]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(section: Section, claims: set[tuple[str, str]], architecture: str, feature: str) -> str:
    if (architecture, feature) in claims:
        return COVERED
    return UNTESTED if section.applies(architecture, feature) else INAPPLICABLE


def rewritten(text: str, claims: set[Claim], sections: dict[str, Section]) -> str:
    """A document with its generated blocks made anew.

    Raises:
        ValueError: a block of an unknown backend, or a claim that has no place.
    """

    def block(match: re.Match[str]) -> str:
        backend = match[1]
        if backend not in sections:
            raise ValueError(f"the document has a block {backend!r}; there are: {list(sections)}")
        own = {(row, column) for found, row, column in claims if found == backend}
        table = render(sections[backend], own)
        return f"<!-- generated: {backend} -->\n\n{table}\n\n<!-- end: {backend} -->"

    return _BLOCK.sub(block, text)


_BLOCK = re.compile(r"<!-- generated: (\S+) -->.*?<!-- end: \1 -->", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs.support")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where it differs")
    options = parser.parse_args(arguments)
    text = DOCUMENT.read_text(encoding="utf-8")
    present = [match[1] for match in _BLOCK.finditer(text) if match[1] in SECTIONS]
    claims = collect(ROOT / path for backend in present for path in SECTIONS[backend].paths)
    new = rewritten(text, claims, SECTIONS)
    if options.check and new != text:
        lines = difflib.unified_diff(
            text.splitlines(),
            new.splitlines(),
            "docs/support.md",
            "what the tests claim",
            lineterm="",
        )
        print("\n".join(lines))
        return 1
    if not options.check:
        DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
