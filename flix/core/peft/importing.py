"""LoRAs in PEFT's file format as features: pure, in numpy, without PEFT (its names and rules checked against 0.21)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter, LayerShape, tensor_name
from flix.core.config.config import FlixConfig, nested
from flix.core.config.targets import exactly
from flix.core.errors import AdapterError, ConfigError, listed
from flix.core.features.names import Feature, normal_group, normal_name
from flix.core.features.registry import FeatureRegistry
from flix.core.files import Path_

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
_DTYPES = ("F16", "BF16", "F32", "F64")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, eq=False)
class PeftLora:
    """A LoRA as PEFT wrote it.

    Attributes:
        pairs: A ``[r, d_in]`` and B ``[d_out, r]`` by layer.
        scales: PEFT's scale by layer.
        kinds: ``"linear"`` or ``"embedding"`` by layer.
        rslora: whether scales are alpha / sqrt(r).
    """

    pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
    scales: Mapping[str, float]
    kinds: Mapping[str, str]
    rslora: bool


def read_peft(directory: Path_, *, skip_modules: bool = False) -> PeftLora:
    """Read a LoRA's folder: adapter_config.json and adapter_model.safetensors.

    Args:
        directory: the folder that PEFT's ``save_pretrained`` wrote.
        skip_modules: leave out whole modules that were trained beside the LoRA (``modules_to_save``) instead of
            refusing them.

    Raises:
        AdapterError: a missing or damaged file, a pickled one, or a kind of adapter that is not a plain LoRA.
    """
    folder = Path(directory)
    settings = _settings(folder)
    tensors, others = _tensors(folder)
    found: dict[str, dict[str, NDArray[Any]]] = {}
    kinds: dict[str, str] = {}
    for match, tensor in tensors:
        path = match["path"]
        found.setdefault(path, {})[match["part"]] = tensor
        kinds[path] = "embedding" if match["kind"] else "linear"
    if others and not skip_modules:
        raise AdapterError(
            f"{str(folder)!r} holds more than low-rank pairs: {listed(others, 5)}. A feature holds pairs "
            "only; with skip_modules=True they alone are imported, and the rest is yours to load"
        )
    pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for path, parts in found.items():
        matrices = set(parts) == {"A", "B"} and all(t.ndim == 2 for t in parts.values())
        if not matrices or not 0 < parts["A"].shape[0] == parts["B"].shape[1]:
            raise AdapterError(
                f"{str(folder)!r}: layer {path!r} needs lora_A [r, d_in] and lora_B [d_out, r], got "
                f"{ {part: list(t.shape) for part, t in parts.items()} }"
            )
        pairs[path] = (parts["A"], parts["B"])
    if not pairs:
        raise AdapterError(f"{str(folder)!r} holds no low-rank pair")
    rslora = bool(settings.get("use_rslora"))
    try:
        scales = {
            path: _scale(settings, path, a.shape[0], rslora) for path, (a, _) in pairs.items()
        }
    except (TypeError, ValueError, re.error) as error:
        raise AdapterError(
            f"{str(folder)!r}: lora_alpha is a number and alpha_pattern {{pattern: number}}; {error}"
        ) from error
    return PeftLora(pairs, scales, kinds, rslora)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{str(folder)!r} is no PEFT adapter: it has no adapter_config.json"
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else settings
        raise AdapterError(f"{str(folder)!r} is no LoRA: its peft_type is {kind!r}; need 'LORA'")
    for name, why in _REFUSED.items():
        if settings.get(name):
            raise AdapterError(f"{str(folder)!r} is not a plain LoRA: {name} is set, {why}")
    if settings.get("bias", "none") != "none":
        raise AdapterError(
            f"{str(folder)!r} trained biases (bias={settings['bias']!r}); a feature holds pairs only"
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{str(folder)!r} began by changing the base's kernels (init_lora_weights={start!r}); let PEFT "
            "convert it to a plain LoRA when it saves (path_initial_model_for_weight_conversion)"
        )
    return settings


def _tensors(
    folder: Path,
) -> tuple[list[tuple[re.Match[str], NDArray[Any]]], list[str]]:
    """The low-rank factors with their parsed names, and the names of what else the file holds."""
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is not read; save it anew with PEFT)"
        raise AdapterError(
            f"{str(folder)!r} has no adapter_model.safetensors"
            f"{pickled if (folder / 'adapter_model.bin').exists() else ''}"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            names = {name: match for name in dtypes if (match := _KEY.fullmatch(name))}
            for name in names:
                if dtypes[name] not in _DTYPES:
                    raise AdapterError(
                        f"{str(path)!r}: tensor {name!r} must be one of {', '.join(_DTYPES)}, got {dtypes[name]}"
                    )
            half = {name for name in names if dtypes[name] == "BF16"}
            found = {name: file.get_tensor(name) for name in names if name not in half}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{str(path)!r} is damaged (truncated or altered): {error}") from error
    if half:
        found.update(_bfloat16(path, half))
    others = [name for name in dtypes if name not in names and not name.endswith(_FROZEN)]
    return [(names[name], found[name]) for name in names], others


def _bfloat16(path: Path, names: set[str]) -> dict[str, NDArray[np.float32]]:
    """Tensors in bfloat16, which numpy lacks, as float32: its bits are the upper half of a float32's."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        found = {}
        for name in names:
            begin, end = header[name]["data_offsets"]
            file.seek(8 + length + begin)
            upper = np.frombuffer(file.read(end - begin), "<u2").astype(np.uint32) << 16
            found[name] = upper.view(np.float32).reshape(header[name]["shape"])
    return found


def _scale(settings: Mapping[str, Any], path: str, rank: int, rslora: bool) -> float:
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


def from_peft(folders: Mapping[str, Path_], group: str, *, skip_modules: bool = False) -> Adapter:
    """LoRAs that PEFT wrote, as one adapter: each becomes a feature, together they are a group.

    Ranks and scales are those of the LoRAs. Where a LoRA's scale differs between its layers, the difference goes into
    B. Paths are those inside the model that PEFT wrapped.

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
            ratio = lora.scales[path] / config.scale(path, (group, name))
            tensors[tensor_name(path, "A", (group, name))] = _wide(a)
            tensors[tensor_name(path, "B", (group, name))] = (
                _wide(b) if ratio == 1.0 else (_wide(b) * ratio).astype(_wide(b).dtype)
            )
    return Adapter(config, layers, tensors)


def _wide(tensor: NDArray[Any]) -> NDArray[Any]:
    return tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)


def _config(
    registry: FeatureRegistry, group: str, loras: Mapping[str, PeftLora], layers: list[str]
) -> FlixConfig:
    rslora = all(lora.rslora for lora in loras.values())
    ranks: dict[Feature, int] = {}
    alphas: dict[Feature, float] = {}
    for name, lora in loras.items():
        # Rank and scale of most layers; the others are spelled out, or go into B.
        sizes = [a.shape[0] for a, _ in lora.pairs.values()]
        rank = max(set(sizes), key=sizes.count)
        path = next(p for p, (a, _) in lora.pairs.items() if a.shape[0] == rank)
        ranks[group, name] = rank
        alpha = lora.scales[path] * (math.sqrt(rank) if rslora else rank)
        # A scale of 0 or below, which PEFT allows, goes into B.
        alphas[group, name] = alpha if alpha > 0 else float(rank)
    groups: dict[tuple[tuple[Feature, int], ...], list[str]] = {}
    for path in layers:
        here = {
            (group, name): lora.pairs[path][0].shape[0] if path in lora.pairs else 0
            for name, lora in loras.items()
        }
        if unlike := tuple((f, r) for f, r in here.items() if r != ranks[f]):
            groups.setdefault(unlike, []).append(path)
    return FlixConfig(
        registry=registry,
        ranks=ranks,
        alpha=alphas,
        scaling="rslora" if rslora else "lora",
        target_modules=tuple(layers),
        rank_pattern={exactly(paths): nested(dict(unlike)) for unlike, paths in groups.items()},
    )
