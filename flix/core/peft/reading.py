"""LoRAs in PEFT's file format, read with checks: in numpy, without PEFT (names and rules checked against 0.21)."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.described import DTYPES, Base, widened
from flix.core.adapter.stored import StoredTensors
from flix.core.checks import is_number, is_whole, rate
from flix.core.config.overrides import Overrides
from flix.core.config.targets import CHANGES_BASE
from flix.core.errors import AdapterError, ConfigError, listed, shown
from flix.core.files import Path_
from flix.core.peft.attention import of_attention
from flix.core.peft.convolutions import as_matrices
from flix.core.peft.exporting import CONFIG_FILE, TENSOR_FILE
from flix.core.peft.parameters import with_experts
from flix.core.strictjson import parsed

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<kind>embedding_)?(?P<part>[AB])(?:\.weight)?"
)
# What the rest of a LoRA's file may do to a model, beyond low-rank pairs: none of it is a feature.
_REFUSED = {
    "use_dora": "DoRA scales the kernel's columns",
    "lora_bias": "the low-rank maps have biases",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "its factors are block-diagonal",
    "monteclora_config": "its factors are drawn anew",
    "kasa_config": "KaSA has singular values of its own",
    "arrow_config": "it routes among experts",
    "layer_replication": "it repeats the base's layers",
    "alora_invocation_tokens": "it acts from certain tokens on",
    "megatron_config": "it is cut for Megatron",
}
# With an adapted embedding or head PEFT saves the frozen kernel as well; it is the base's.
_FROZEN = ".base_layer.weight"


@dataclass(frozen=True, eq=False)
class PeftLora:
    """A LoRA as PEFT wrote it.

    Attributes:
        pairs: A ``[r, d_in]`` and B ``[d_out, r]`` by layer; of experts ``[E, r, d_in]`` and ``[E, d_out, r]``.
        scales: PEFT's scale by layer.
        kinds: ``"linear"`` or ``"embedding"`` by layer.
        rslora: whether scales are alpha / sqrt(r).
        dropout: its ``lora_dropout``.
        base: the base that it was trained on, as PEFT names it.
    """

    pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
    scales: Mapping[str, float]
    kinds: Mapping[str, str]
    rslora: bool
    base: Base | None = None
    dropout: float = 0.0


def read_peft(directory: Path_, *, skip_modules: bool = False) -> PeftLora:
    """Read a LoRA's folder: adapter_config.json and adapter_model.safetensors.

    Args:
        directory: the folder that PEFT's ``save_pretrained`` wrote.
        skip_modules: leave out whole modules that were trained beside the LoRA (``modules_to_save``) instead of
            refusing them.

    Raises:
        AdapterError: a missing or damaged file, a pickled one, a kind of adapter that is not a plain LoRA, ranks that
            are not the tensors', a setting that is no number or truth value, or values that are not finite.
    """
    folder = Path(directory)
    while True:
        with ExitStack() as stack:
            place = _held(folder, stack)
            try:
                return _read(folder, place, stack, skip_modules)
            except FileNotFoundError:
                # A writer put another folder into its place: read that.
                if place is None or os.path.samestat(os.fstat(place), os.stat(folder)):
                    raise AdapterError(f"{str(folder)!r} lost a file while it was read") from None


def _held(folder: Path, stack: ExitStack) -> int | None:
    """The folder itself, whatever takes its place: both files are read out of one. None where systems cannot do it."""
    if os.open not in os.supports_dir_fd or not folder.is_dir():
        return None
    place = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, place)
    return place


def _open(folder: Path, place: int | None, name: str) -> BinaryIO:
    """A file of the folder."""

    def opened(_: str, flags: int) -> int:
        handle = os.open(name, flags | os.O_NONBLOCK, dir_fd=place)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise AdapterError(f"{str(folder / name)!r} is not a regular file")
        return handle

    return open(folder / name, "rb", buffering=0, opener=opened if place is not None else None)


def _read(folder: Path, place: int | None, stack: ExitStack, skip_modules: bool) -> PeftLora:
    settings = _settings(folder, place)
    tensors, others = _tensors(folder, place, stack)
    found: dict[str, dict[str, NDArray[Any]]] = {}
    kinds: dict[str, str] = {}
    for match, tensor in tensors:
        path, kind = match["path"], "embedding" if match["kind"] else "linear"
        parts = found.setdefault(path, {})
        if match["part"] in parts or kinds.setdefault(path, kind) != kind:
            raise AdapterError(f"{str(folder)!r} holds layer {path!r} twice, under two names")
        parts[match["part"]] = tensor
    if others and not skip_modules:
        raise AdapterError(
            f"{str(folder)!r} holds more than low-rank pairs: {listed(others, 5)}. A feature holds pairs "
            "only; with skip_modules=True they alone are imported, and the rest is yours to load"
        )
    where = repr(str(folder / CONFIG_FILE))
    ranks, alphas = (_Values(settings, name, where) for name in ("r", "lora_alpha"))
    if targets := _target_parameters(settings, where):
        ranks.check_size(found)
        found = with_experts(found, targets, ranks.of, repr(str(folder)))
    pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for path, parts in found.items():
        if path in kinds:
            parts, axes = as_matrices(parts), 2
        else:
            kinds[path], axes = "linear", 3  # experts
        matrices = set(parts) == {"A", "B"} and all(t.ndim == axes for t in parts.values())
        if not matrices or not 0 < parts["A"].shape[-2] == parts["B"].shape[-1]:
            raise AdapterError(
                f"{str(folder)!r}: layer {path!r} needs lora_A [r, d_in] and lora_B [d_out, r], got "
                f"{ {part: list(t.shape) for part, t in parts.items()} }"
            )
        pairs[path] = (parts["A"], parts["B"])
    if not pairs:
        raise AdapterError(f"{str(folder)!r} holds no low-rank pair")
    for values in (ranks, alphas):
        values.check_size(pairs)
    rslora = settings.get("use_rslora", False)
    scales: dict[str, float] = {}
    for path, (a, _) in pairs.items():
        rank = a.shape[-2]
        if (said := ranks.of(path)) != rank:
            raise AdapterError(
                f"{str(folder)!r}: layer {path!r} has rank {rank} in its tensors, and {said} by {CONFIG_FILE} (r, "
                "rank_pattern)"
            )
        scales[path] = float(alphas.of(path)) / (math.sqrt(rank) if rslora else rank)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    base = Base(
        name if isinstance(name, str) else None, revision if isinstance(revision, str) else None
    )
    dropout = _dropout(settings, where)
    names = of_attention(pairs)
    pairs = {name: pairs[path] for path, name in names.items()}
    scales = {name: scales[path] for path, name in names.items()}
    kinds = {name: kinds[path] for path, name in names.items()}
    return PeftLora(pairs, scales, kinds, bool(rslora), base if base.name else None, dropout)


def _target_parameters(settings: Mapping[str, Any], where: str) -> list[str]:
    given = settings.get("target_parameters") or []
    if not isinstance(given, list) or not all(isinstance(t, str) and t for t in given):
        raise AdapterError(
            f"{where}: target_parameters must be a list of names, got {shown(given)}"
        )
    return given


def _dropout(settings: Mapping[str, Any], where: str) -> float:
    try:
        return rate(settings.get("lora_dropout") or 0.0, "lora_dropout")
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from None


class _Values:
    """Numbers that a configuration gives to layers: one for all, others by pattern; the first that matches counts."""

    def __init__(self, settings: Mapping[str, Any], name: str, where: str) -> None:
        self._name, self._where = name, where
        self._pattern = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name]
        self._all = self._number(settings.get(name, 8), name)
        given = settings.get(self._pattern) or {}
        if not isinstance(given, dict):
            raise AdapterError(
                f"{where}: {self._pattern} is {{pattern: number}}, got {shown(given)}"
            )
        try:
            self._given = Overrides([(pattern, {}) for pattern in given])
        except ConfigError as error:
            raise AdapterError(f"{where}: {self._pattern}: {error}") from None
        self._numbers = [self._number(v, f"{self._pattern}[{shown(p)}]") for p, v in given.items()]

    def _number(self, value: object, what: str) -> float:
        ok = is_whole(value) and 0 < value < 1 << 31 if self._name == "r" else is_number(value)  # type: ignore[operator]
        if not ok or (isinstance(value, int) and abs(value) >= 1 << 63) or not math.isfinite(value):  # type: ignore[arg-type]
            kind = "a whole number of 1 or more" if self._name == "r" else "a finite number"
            raise AdapterError(f"{self._where}: {what} must be {kind}, got {shown(value)}")
        return value  # type: ignore[return-value]

    def check_size(self, layers: Iterable[str]) -> None:
        """Refuse patterns that take long to match."""
        try:
            self._given.check_size(layers, 1)
        except ConfigError as error:
            raise AdapterError(f"{self._where}: {error}") from None

    def of(self, path: str) -> float:
        """The number of a layer."""
        found = self._given.matching(path)
        return self._numbers[found[0]] if found else self._all


def _settings(folder: Path, place: int | None) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not _is_there(folder, place, CONFIG_FILE):
        raise AdapterError(f"{str(folder)!r} is no PEFT adapter: it has no {CONFIG_FILE}")
    try:
        with _open(folder, place, CONFIG_FILE) as file:
            text = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error
    settings = parsed(text, repr(str(path)))
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else settings
        raise AdapterError(
            f"{str(folder)!r} is no LoRA: its peft_type is {shown(kind)}; need 'LORA'"
        )
    for name, why in _REFUSED.items():
        if settings.get(name):
            raise AdapterError(f"{str(folder)!r} is not a plain LoRA: {name} is set, {why}")
    if not isinstance(settings.get("use_rslora", False), bool | None):
        raise AdapterError(
            f"{str(path)!r}: use_rslora must be true or false, got {shown(settings['use_rslora'])}"
        )
    if settings.get("bias", "none") != "none":
        raise AdapterError(
            f"{str(folder)!r} trained biases (bias={shown(settings['bias'])}); a feature holds pairs only"
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"{str(folder)!r} began by changing the base's kernels (init_lora_weights={shown(start)}); let PEFT "
            "convert it to a plain LoRA when it saves (path_initial_model_for_weight_conversion)"
        )
    return settings


def _is_there(folder: Path, place: int | None, name: str) -> bool:
    try:
        if place is None:
            return (folder / name).is_file()
        os.stat(name, dir_fd=place)
    except FileNotFoundError:
        # A folder that was replaced has lost its files; one that is there never had it.
        if place is not None and not os.path.samestat(os.fstat(place), os.stat(folder)):
            raise
        return False
    except OSError:
        return True  # opening it says what is wrong
    return True


def _tensors(
    folder: Path, place: int | None, stack: ExitStack
) -> tuple[list[tuple[re.Match[str], NDArray[Any]]], list[str]]:
    """The low-rank factors with their parsed names, and the names of what else the file holds."""
    path = folder / TENSOR_FILE
    if not _is_there(folder, place, TENSOR_FILE):
        pickled = " (adapter_model.bin is a pickle, which is not read; save it anew with PEFT)"
        raise AdapterError(
            f"{str(folder)!r} has no {TENSOR_FILE}"
            f"{pickled if (folder / 'adapter_model.bin').exists() else ''}"
        )
    try:
        stored = StoredTensors(stack.enter_context(_open(folder, place, TENSOR_FILE)))
        names = {name: match for name in stored if (match := _KEY.fullmatch(name))}
        for name in names:
            if stored.dtypes[name] not in DTYPES:
                raise AdapterError(
                    f"{str(path)!r}: tensor {name!r} must be one of F16, BF16, F32, F64, got {stored.dtypes[name]}"
                )
        found = {name: widened(stored[name], stored.dtypes[name]) for name in names}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error
    except ValueError as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{str(path)!r} is damaged (truncated or altered): {error}") from error
    for name, tensor in found.items():
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{str(path)!r}: tensor {name!r} holds values that are NaN or infinite")  # fmt: skip
    others = [name for name in stored if name not in names and not name.endswith(_FROZEN)]
    return [(names[name], found[name]) for name in names], others
