"""LoRAs in PEFT's file format as features: pure, in numpy, without PEFT; :mod:`flix.core.peft.reading` reads them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter, LayerShape, tensor_name
from flix.core.config.config import FlixConfig
from flix.core.config.overrides import nested
from flix.core.config.targets import exactly
from flix.core.errors import AdapterError, ConfigError
from flix.core.features.names import Feature, normal_group, normal_name
from flix.core.features.registry import FeatureRegistry
from flix.core.files import Path_
from flix.core.peft.reading import PeftLora, read_peft


def from_peft(folders: Mapping[str, Path_], group: str, *, skip_modules: bool = False) -> Adapter:
    """Read LoRAs that PEFT wrote as one adapter: each becomes a feature of one group.

    Ranks and scales are those of the LoRAs, also where they differ by layer (``rank_pattern``, ``alpha_pattern``).
    PEFT allows a scale below 0; its sign goes into B. A scale of 0 makes B zero. If all LoRAs have the same
    ``lora_dropout``, it is kept. Paths are those inside the model that PEFT wrapped.

    Args:
        folders: the folder of each LoRA, by the name that its feature gets.
        group: the group's name.
        skip_modules: see :func:`read_peft`.

    Raises:
        AdapterError: a folder without a plain LoRA, or LoRAs of different models.
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
            many = len(a) if a.ndim == 3 else 0
            shape = LayerShape(a.shape[-1], b.shape[-2], lora.kinds[path], many)
            if layers.setdefault(path, shape) != shape:
                known = layers[path]
                raise AdapterError(
                    f"{name!r}: layer {path!r} is {shape}, but "
                    f"{known} in another LoRA; they must belong to one model"
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
        sizes = [a.shape[-2] for a, _ in lora.pairs.values()]
        ranks[group, name] = max(set(sizes), key=sizes.count)
        own[group, name] = here = {
            p: _alpha(lora.scales[p], a.shape[-2], rslora) for p, (a, _) in lora.pairs.items()
        }
        given = [*here.values()]
        alphas[group, name] = max(given, key=given.count)
    others: dict[tuple[tuple[Feature, int], ...], list[str]] = {}
    scaled: dict[tuple[tuple[Feature, float], ...], list[str]] = {}
    for path in layers:
        sizes_here = {
            (group, name): lora.pairs[path][0].shape[-2] if path in lora.pairs else 0
            for name, lora in loras.items()
        }
        if unlike := tuple((f, r) for f, r in sizes_here.items() if r != ranks[f]):
            others.setdefault(unlike, []).append(path)
        apart = ((f, found[path]) for f, found in own.items() if path in found)
        if differing := tuple((f, alpha) for f, alpha in apart if alpha != alphas[f]):
            scaled.setdefault(differing, []).append(path)
    rates = {lora.dropout for lora in loras.values()}
    return FlixConfig(
        registry=registry,
        ranks=ranks,
        alpha=alphas,
        lora_dropout=min(rates) if len(rates) == 1 and max(rates) < 1 else 0.0,
        scaling="rslora" if rslora else "lora",
        target_modules=tuple(layers),
        rank_pattern={exactly(paths): nested(dict(unlike)) for unlike, paths in others.items()},
        alpha_pattern={exactly(paths): nested(dict(unlike)) for unlike, paths in scaled.items()},
    )


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """The alpha of a scale's size; the rank for a scale of 0, which B takes. Rounding makes no two of one."""
    alpha = abs(scale) * (math.sqrt(rank) if rslora else rank)
    return float(f"{alpha:.12g}") if alpha else float(rank)


__all__ = ["PeftLora", "from_peft", "read_peft"]
