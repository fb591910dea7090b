"""LoRAs in PEFT's file format as features: pure, in numpy, without PEFT (its names and rules checked against 0.21)."""

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

from flix.core.adapter.adapter import Adapter, LayerShape, tensor_name
from flix.core.adapter.described import DTYPES, Base, widened
from flix.core.adapter.stored import StoredTensors
from flix.core.checks import is_number, is_whole
from flix.core.config.config import FlixConfig
from flix.core.config.overrides import Overrides, nested
from flix.core.config.targets import exactly
from flix.core.errors import AdapterError, ConfigError, listed, shown
from flix.core.features.names import Feature, normal_group, normal_name
from flix.core.features.registry import FeatureRegistry
from flix.core.files import Path_
from flix.core.peft.convolutions import as_matrices
from flix.core.peft.exporting import CONFIG_FILE, TENSOR_FILE
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
    "target_parameters": "it changes bare parameters",
    "megatron_config": "it is cut for Megatron",
}
# With an adapted embedding or head PEFT saves the frozen kernel as well; it is the base's.
_FROZEN = ".base_layer.weight"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, eq=False)
class PeftLora:
    """A LoRA as PEFT wrote it.

    Attributes:
        pairs: A ``[r, d_in]`` and B ``[d_out, r]`` by layer.
        scales: PEFT's scale by layer.
        kinds: ``"linear"`` or ``"embedding"`` by layer.
        rslora: whether scales are alpha / sqrt(r).
        base: the base that it was trained on, as PEFT names it.
    """

    pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
    scales: Mapping[str, float]
    kinds: Mapping[str, str]
    rslora: bool
    base: Base | None = None


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
            raise AdapterError(f"{str(folder / name)!r} is no regular file")
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
    pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for path, parts in found.items():
        parts = as_matrices(parts)
        matrices = set(parts) == {"A", "B"} and all(t.ndim == 2 for t in parts.values())
        if not matrices or not 0 < parts["A"].shape[0] == parts["B"].shape[1]:
            raise AdapterError(
                f"{str(folder)!r}: layer {path!r} needs lora_A [r, d_in] and lora_B [d_out, r], got "
                f"{ {part: list(t.shape) for part, t in parts.items()} }"
            )
        pairs[path] = (parts["A"], parts["B"])
    if not pairs:
        raise AdapterError(f"{str(folder)!r} holds no low-rank pair")
    where = repr(str(folder / CONFIG_FILE))
    ranks, alphas = (_Values(settings, name, where) for name in ("r", "lora_alpha"))
    for values in (ranks, alphas):
        values.check_size(pairs)
    rslora = settings.get("use_rslora", False)
    scales: dict[str, float] = {}
    for path, (a, _) in pairs.items():
        rank = a.shape[0]
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
    return PeftLora(pairs, scales, kinds, bool(rslora), base if base.name else None)


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
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
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
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{str(path)!r} is damaged (truncated or altered): {error}") from error
    for name, tensor in found.items():
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{str(path)!r}: tensor {name!r} holds values that are NaN or infinite")  # fmt: skip
    others = [name for name in stored if name not in names and not name.endswith(_FROZEN)]
    return [(names[name], found[name]) for name in names], others


def from_peft(folders: Mapping[str, Path_], group: str, *, skip_modules: bool = False) -> Adapter:
    """LoRAs that PEFT wrote, as one adapter: each becomes a feature, together they are a group.

    Ranks and scales are those of the LoRAs, by layer where they differ (``rank_pattern``, ``alpha_pattern``). The sign
    of a scale below 0, which PEFT allows, goes into B, and a scale of 0 makes B zero. Paths are those inside the model
    that PEFT wrapped.

    Args:
        folders: the folder of each LoRA, by the name that its feature gets.
        group: the group's name.
        skip_modules: see :func:`read_peft`.

    Raises:
        AdapterError: a folder that holds no plain LoRA, or LoRAs of different models.
        FeatureError: an ill-formed name.
    """
    if isinstance(folders, str | os.PathLike) or not isinstance(folders, Mapping) or not folders:
        raise ConfigError(f"from_peft takes {{feature: folder}}, got {folders!r}")
    group = normal_group(group)
    names = [normal_name(group, name) for name in folders]
    registry = FeatureRegistry({group: names})  # refuses a name given twice
    loras = {
        name: read_peft(folder, skip_modules=skip_modules)
        for name, folder in zip(names, folders.values(), strict=True)
    }
    layers: dict[str, LayerShape] = {}
    for name, lora in loras.items():
        for path, (a, b) in lora.pairs.items():
            shape = LayerShape(a.shape[1], b.shape[0], lora.kinds[path])
            if layers.setdefault(path, shape) != shape:
                known = layers[path]
                raise AdapterError(
                    f"{name!r}: layer {path!r} is {shape.kind} {shape.d_in} -> {shape.d_out}, but "
                    f"{known.kind} {known.d_in} -> {known.d_out} in another LoRA; they must belong to one model"
                )
    config = _config(registry, group, loras, list(layers))
    tensors: dict[str, NDArray[Any]] = {}
    for name, lora in loras.items():
        for path, (a, b) in lora.pairs.items():
            tensors[tensor_name(path, "A", (group, name))] = _wide(a)
            b, scale = _wide(b), lora.scales[path]
            _check_scale(b, scale, f"{name!r}: layer {path!r}")
            tensors[tensor_name(path, "B", (group, name))] = b if scale > 0 else b * np.sign(scale)
    bases = {lora.base for lora in loras.values()}
    return Adapter(config, layers, tensors, base=bases.pop() if len(bases) == 1 else None)


def _check_scale(b: NDArray[Any], scale: float, where: str) -> None:
    """Refuse a scale that its layer's values do not bear: their product must neither overflow nor vanish."""
    with np.errstate(over="ignore", under="ignore"):
        lost = scale and not b.dtype.type(scale)
        if lost or not np.isfinite(np.abs(b).max(initial=0) * b.dtype.type(scale)):
            raise AdapterError(
                f"{where} has the scale {scale:.3g}, and {b.dtype} cannot hold what it makes of its B"
            )


def _wide(tensor: NDArray[Any]) -> NDArray[Any]:
    return tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)


def _config(
    registry: FeatureRegistry, group: str, loras: Mapping[str, PeftLora], layers: list[str]
) -> FlixConfig:
    rslora = all(lora.rslora for lora in loras.values())
    ranks: dict[Feature, int] = {}
    alphas: dict[Feature, float] = {}
    own: dict[Feature, dict[str, float]] = {}
    for name, lora in loras.items():
        # Rank and alpha of most layers; the others are spelled out.
        sizes = [a.shape[0] for a, _ in lora.pairs.values()]
        ranks[group, name] = max(set(sizes), key=sizes.count)
        own[group, name] = here = {
            p: _alpha(lora.scales[p], a.shape[0], rslora) for p, (a, _) in lora.pairs.items()
        }
        given = [*here.values()]
        alphas[group, name] = max(given, key=given.count)
    others: dict[tuple[tuple[Feature, int], ...], list[str]] = {}
    scaled: dict[tuple[tuple[Feature, float], ...], list[str]] = {}
    for path in layers:
        sizes_here = {
            (group, name): lora.pairs[path][0].shape[0] if path in lora.pairs else 0
            for name, lora in loras.items()
        }
        if unlike := tuple((f, r) for f, r in sizes_here.items() if r != ranks[f]):
            others.setdefault(unlike, []).append(path)
        apart = ((f, found[path]) for f, found in own.items() if path in found)
        if differing := tuple((f, alpha) for f, alpha in apart if alpha != alphas[f]):
            scaled.setdefault(differing, []).append(path)
    return FlixConfig(
        registry=registry,
        ranks=ranks,
        alpha=alphas,
        scaling="rslora" if rslora else "lora",
        target_modules=tuple(layers),
        rank_pattern={exactly(paths): nested(dict(unlike)) for unlike, paths in others.items()},
        alpha_pattern={exactly(paths): nested(dict(unlike)) for unlike, paths in scaled.items()},
    )


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """The alpha of a scale's size; the rank for a scale of 0, which B takes. Rounding makes no two of one."""
    alpha = abs(scale) * (math.sqrt(rank) if rslora else rank)
    return float(f"{alpha:.12g}") if alpha else float(rank)
