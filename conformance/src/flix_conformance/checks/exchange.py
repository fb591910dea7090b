"""What goes in and out beside features: LoRAs in PEFT's format, trained heads, the base; kernels with an update in."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flix_conformance import bits, oracle
from flix_conformance.backend import Backend
from flix_conformance.checks._registry import check
from flix_conformance.checks.conduct import FIRST, SECOND
from flix_conformance.checks.files import pack, unpack
from flix_conformance.checks.lifecycle import case_of, check_state, routed_to
from flix_conformance.checks.outputs import check_output
from flix_conformance.compare import close, same_bits
from flix_conformance.harness import Array, Case, Stack
from flix_conformance.strategies import Draw
from flix_conformance.table import Feature

LORA_CONFIG, LORA_FILE = "adapter_config.json", "adapter_model.safetensors"


def _names(case: Case) -> tuple[str, str]:
    """PEFT's names of A ``[r, d_in]`` and B ``[d_out, r]`` of the case's layer."""
    stem = f"base_model.model.{case.path}.lora_"
    if case.kind == "embedding":
        return f"{stem}embedding_A", f"{stem}embedding_B"
    return f"{stem}A.weight", f"{stem}B.weight"


def _write_lora(draw: Draw, case: Case, folder: Path) -> tuple[Array, Array, float]:
    """A LoRA of the case's layer as PEFT writes it: A, B and its scale."""
    rng, rank = draw.generator(), draw.one_of([1, 2, 4])
    alpha, root = draw.one_of([1, 3, 8]), draw.one_of([False, True])
    a = rng.normal(size=(rank, case.d_in)).astype(np.float32)
    b = rng.normal(size=(case.d_out, rank)).astype(np.float32)
    said = {"r": rank, "lora_alpha": alpha, "use_rslora": root, "target_modules": [case.path]}
    folder.mkdir()
    (folder / LORA_CONFIG).write_text(json.dumps({"peft_type": "LORA", **said}), encoding="utf-8")
    (folder / LORA_FILE).write_bytes(pack(dict(zip(_names(case), (a, b), strict=True))))
    return a, b, alpha / (rank**0.5 if root else rank)


@check(
    "a LoRA that PEFT wrote becomes a feature with its values and its scale, in an adapted model and in a plain one",
    examples=6,
    uses=("changes",),
)
def imported(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    group = draw.one_of([*case.table.groups, "loras"])
    new, number = (group, "lora"), len(case.table)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "lora"
        a, b, scale = _write_lora(draw, case, folder)
        model = backend.verb("import_peft")(backend.adapted(case), {"lora": folder}, group)
        plain = backend.plain(case)
        alone = backend.verb("import_peft")(plain, {"lora": folder}, group, strategy=case.strategy)
    pairs = {**case.pairs, new: (a, b)}
    table = case.table.added(new, scale)
    assert not check_state(backend, model, table.ids, pairs, "after a LoRA was imported")
    grown = case.but(table=table, pairs=pairs, model=model)
    check_output(backend, routed_to(draw, grown, number))
    only = replace(case.table, features=(new,), scales={new: scale}, implies={}, alphas={})
    ids = np.where(case.ids < 0, -1, 0).astype(np.int32)
    check_output(backend, case.but(table=only, pairs={new: (a, b)}, ids=ids, model=alone))


def _composed(draw: Draw, case: Case) -> tuple[Any, dict[Feature, float]]:
    """A row, and what it activates; something that has an update, at least."""
    feature = draw.one_of(sorted(case.pairs))
    row: dict[str, Any] = {feature[0]: {feature[1]: draw.one_of([1.0, -0.5, 2.5])}}
    active = bits.active_features(case.table, row)
    return row, {case.table.features[i]: w for i, w in active.items()}


def _sizes(case: Case, active: Mapping[Feature, float]) -> Array:
    return oracle.merged(oracle.magnitude(case), {f: abs(w) for f, w in active.items()})


@check(
    "a composition that is exported is one LoRA in PEFT's format, with the formula's update",
    examples=6,
    needs=("peft_facts",),
    uses=("merge", "files"),
)
def exported(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    row, active = _composed(draw, case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "lora"
        backend.verb("export_peft")(backend.adapted(case), row, folder)
        said = json.loads((folder / LORA_CONFIG).read_text(encoding="utf-8"))
        tensors = unpack((folder / LORA_FILE).read_bytes())
    assert said["peft_type"] == "LORA", f"peft_type is {said['peft_type']!r}"
    assert set(tensors) == set(_names(case)), f"the file holds {sorted(tensors)}"
    a, b = (tensors[name].astype(np.float64) for name in _names(case))
    ranks = (a.shape[0], b.shape[1], int(said["r"]))
    assert len(set(ranks)) == 1, f"A, B and the description have the ranks {ranks}"
    scale = said["lora_alpha"] / (said["r"] ** 0.5 if said.get("use_rslora") else said["r"])
    found = case.kernel.astype(np.float64) + scale * (b @ a).T
    wanted = oracle.merged(case, active)
    close(found, wanted, _sizes(case, active), "float32", "the kernel with the exported LoRA")


@check(
    "a model that is merged in place answers under that composition alone, and unmerge gives every bit back",
    examples=6,
    needs=("fold", "folded", "unfold"),
    uses=("merge",),
)
def merged_in_place(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    row, active = _composed(draw, case)
    model = backend.adapted(case)
    before = np.array(backend.harness.kernel(model, case.path))
    backend.verb("merge_in_place")(model, row)
    kernel = np.asarray(backend.harness.kernel(model, case.path))
    size = _sizes(case, active)
    close(kernel, oracle.merged(case, active), size, case.dtype, "the kernel that is merged")
    x, bias = oracle.dense_x(case), 0.0 if case.bias is None else case.bias
    y, _ = backend.harness.call(model, replace(case.batch, ids=None, weights=None))
    expected = x @ oracle.merged(case, active) + bias
    close(y, expected, np.abs(x) @ size + np.abs(bias), case.dtype, "the merged output", slack=2.0)
    for what in ("routing", "a second merge"):
        try:
            if what == "routing":
                backend.harness.call(model, case.batch)
            else:
                backend.verb("merge_in_place")(model, row)
        except ValueError:
            continue
        raise AssertionError(f"a model that is merged in place took {what}")
    assert not check_state(backend, model, case.table.ids, case.pairs, "while it is merged")
    backend.verb("unmerge")(model)
    same_bits(np.asarray(backend.harness.kernel(model, case.path)), before, "the kernel unmerged")
    check_output(backend, case.but(model=model))


HEAD = "lm_head"


def _with_head(draw: Draw) -> tuple[Stack, Stack]:
    """A model with a head, and one with another head and other values of the features."""
    stack = draw.stack([FIRST, SECOND, HEAD], [FIRST, SECOND])
    *others, head = stack.layers
    layers = (*others, replace(head, kernel=head.kernel + 1))
    pairs = {
        path: {f: (0 * a, 0 * b) for f, (a, b) in own.items()} for path, own in stack.pairs.items()
    }
    return stack, replace(stack, layers=layers, pairs=pairs)


@check(
    "a head that was trained goes with the adapter, trains where it is loaded, and stays away if heads=False says so",
    examples=3,
    needs=("head_places", "heads", "put_heads"),
    uses=("files",),
)
def trained_files(draw: Draw, backend: Backend) -> None:
    stack, other = _with_head(draw)
    model = backend.stacked(stack)
    own, theirs = stack.layers[-1].kernel, other.layers[-1].kernel
    named: dict[str, Any] = {"heads": [HEAD]}
    if not backend.lacks(["unfreeze"]):
        backend.harness.unfreeze(model, HEAD)
        named = draw.one_of([{}, named])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        backend.verb("save")(model, folder, **named)
        for target in ("a plain model", "an adapted one"):
            for heads, kernel in ((True, own), (False, theirs)):
                into = backend.harness.plain(other.layers, other.batch.x)
                if target != "a plain model":
                    into = backend.stacked(other)
                loaded = backend.verb("load")(into, folder, heads=heads)
                found = np.asarray(backend.harness.kernel(loaded, HEAD)).astype(np.float32)
                same_bits(found, kernel, f"the head of {target}, loaded with heads={heads},")
        backend.verb("save")(loaded := backend.verb("load")(into, folder), Path(name) / "again")
        files = [unpack((Path(name) / n / "flix.safetensors").read_bytes()) for n in ("adapter", "again")]  # fmt: skip
    assert set(files[0]) == set(files[1]), "a head that was loaded is not saved again"
    refused = (("no parameter", "nothing"), ("an adapted layer's kernel", FIRST))
    for what, bad in refused:
        try:
            with tempfile.TemporaryDirectory() as name:
                backend.verb("save")(loaded, Path(name) / "adapter", heads=[bad])
        except ValueError as error:
            assert bad in str(error), f"the message does not name {bad!r}: {error}"
        else:
            raise AssertionError(f"{bad!r}, {what}, was saved as a head")


@check(
    "an adapter that is loaded onto a base with other kernels is warned of, and onto its own is not",
    examples=4,
    needs=("base_name", "kernel_samples"),
    uses=("files",),
)
def other_base(draw: Draw, backend: Backend) -> None:
    case = case_of(draw, backend)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        backend.save(case, folder)
        for kernel, wanted in ((case.kernel, False), (case.kernel * 1.5 + 1, True)):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                backend.load(case.but(kernel=kernel.astype(np.float32)), folder)
            told = [str(warning.message) for warning in said if "kernels" in str(warning.message)]
            which = "other" if wanted else "its own"
            assert bool(told) == wanted, f"onto {which} kernels, the warnings are {told}"
