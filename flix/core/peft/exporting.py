"""A composition as one LoRA in PEFT's file format, exactly: pure, in numpy.

The names and rules are PEFT's (checked against 0.21): keys ``base_model.model.<path>.lora_A.weight``, embeddings
``lora_embedding_A``; one rank for all layers, since servers are reported to ignore ``rank_pattern``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter
from flix.core.adapter.composition import Composition, lora_pair
from flix.core.adapter.lowrank import nearest
from flix.core.checks import whole
from flix.core.errors import AdapterError, listed
from flix.core.features.names import written
from flix.core.files import Path_, sweep, write_file
from flix.core.folders import alone, whole_folder
from flix.core.peft.vllm import ServingReport, check_vllm

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftFacts:
    """What PEFT's and vLLM's files say of a model beside its LoRA.

    Attributes:
        target_modules: the adapted layers as PEFT's suffixes.
        architecture: the model's class.
        modules: whole modules that were trained beside the features: state by path.
        fan_in_fan_out, base_model: PEFT's.
        encoder_decoder, vocabulary: what vLLM asks.
    """

    target_modules: Sequence[str]
    architecture: str
    modules: Mapping[str, Mapping[str, NDArray[np.float32]]]
    fan_in_fan_out: bool = False
    base_model: str | None = None
    encoder_decoder: bool = False
    vocabulary: int | None = None

    @property
    def task_type(self) -> str | None:
        """PEFT's name of what the model's class is for; None where it has none."""
        tasks = (task for ending, task in _TASKS.items() if self.architecture.endswith(ending))
        return next(tasks, None)


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def suffixes(adapted: Collection[str], modules: Collection[str]) -> list[str]:
    """The adapted layers as PEFT's target list: last components where they are exact, as servers want them.

    Args:
        adapted: their paths.
        modules: the paths of all modules.
    """
    plain = {path.rsplit(".", 1)[-1] for path in set(modules) - set(adapted)}
    tails = {path: path.rsplit(".", 1)[-1] for path in adapted}
    full = [path for path, tail in tails.items() if tail in plain]
    return sorted(set(tails.values()) - plain) + sorted(full)


@dataclass(frozen=True)
class PeftExport:
    """What was exported.

    Attributes:
        rank: the LoRA's rank, r.
        layers: the number of adapted layers.
        error: the relative error of the update where it was cut to a rank that was asked for (Frobenius norm over all
            layers, of the composition's); 0.0 where it is exact.
        serving: whether vLLM serves it, and how.
    """

    rank: int
    layers: int
    error: float
    serving: ServingReport

    @property
    def max_lora_rank(self) -> int | None:
        """The least value of vLLM's ``--max-lora-rank`` that serves it; None above the largest."""
        return self.serving.max_lora_rank

    @property
    def message(self) -> str:
        """What to tell the user about serving."""
        cut = ""
        if self.error:
            cut = f"cut to rank {self.rank}: the update's relative error is {self.error:.2e}\n"
        return f"{cut}{self.serving}"


def as_peft(
    adapter: Adapter,
    active: Composition,
    *,
    target_modules: Sequence[str] | None = None,
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The composition as PEFT's configuration and tensors.

    Layers of unequal total rank are padded with zeros to the largest; alpha equals the rank, so PEFT's scale is 1.

    Args:
        adapter: the adapter.
        active: the composition.
        target_modules: PEFT's list of suffixes; default: the layers' full paths.
        fan_in_fan_out: whether layers are transformers' Conv1D.
        base_model: the base model's name or folder.
        task_type: PEFT's task type.

    Raises:
        AdapterError: the composition has no update in any layer.
    """
    check_exportable(adapter, active)
    pairs = {layer: lora_pair(adapter, layer, active) for layer in adapter.layers}
    rank = max(a.shape[0] for a, _ in pairs.values())
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer, (a, b) in pairs.items():
        missing = rank - a.shape[0]
        a = np.pad(a, ((0, missing), (0, 0))).astype(np.float32)
        b = np.pad(b, ((0, 0), (0, missing))).astype(np.float32)
        stem = f"base_model.model.{layer}"
        if adapter.layers[layer].kind == "embedding":
            tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"] = a, b
        else:
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(target_modules or adapter.layers),
        "inference_mode": True,
    }
    return config, tensors


def check_exportable(adapter: Adapter, active: Composition) -> None:
    """Refuse a composition without an update.

    Raises:
        AdapterError: its features have rank 0 in every layer.
    """
    config = adapter.config
    if not any(config.rank(layer, feature) for layer in adapter.layers for feature, _ in active):
        names = listed(written(feature) for feature, _ in active)
        raise AdapterError(f"nothing to export: {names} have rank 0 in every layer")


def with_modules(
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[np.float32]],
    modules: Mapping[str, Mapping[str, NDArray[np.float32]]],
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """A LoRA with whole modules beside it (``modules_to_save``).

    Args:
        config: PEFT's configuration.
        tensors: PEFT's tensors.
        modules: each module's state by the module's path; none changes nothing.
    """
    whole = {
        f"base_model.model.{path}.{name}": value
        for path, state in modules.items()
        for name, value in state.items()
    }
    return {**config, "modules_to_save": list(modules) or None}, {**tensors, **whole}


def cut_to_rank(
    config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]], rank: int
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]], float]:
    """A LoRA of at most this rank whose update is as near as can be, layer by layer (Eckart and Young).

    Args:
        config: PEFT's configuration; one rank for all layers.
        tensors: PEFT's tensors.
        rank: the rank wanted.

    Returns:
        Configuration, tensors, and the relative error in the Frobenius norm over all layers. A LoRA whose rank is no
        larger comes back as it is, with 0.0.

    Raises:
        ConfigError: a rank below 1.
    """
    rank = whole(rank, "compress_to", 1)
    if int(config["r"]) <= rank:
        return dict(config), dict(tensors), 0.0
    cut: dict[str, NDArray[np.float32]] = {}
    lost = norm = 0.0
    for name, a in tensors.items():
        if not name.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        other = name.replace(".lora_A.", ".lora_B.").replace(
            ".lora_embedding_A", ".lora_embedding_B"
        )
        first, second, values = nearest(a, tensors[other], rank)
        missing = rank - first.shape[0]  # a layer narrower than the rank
        cut[name] = np.pad(first, ((0, missing), (0, 0))).astype(np.float32)
        cut[other] = np.pad(second, ((0, 0), (0, missing))).astype(np.float32)
        lost += float(np.sum(values[rank:] ** 2))
        norm += float(np.sum(values**2))
    alpha = float(config["lora_alpha"]) * rank / int(config["r"])
    settings = {**config, "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    return settings, cut, (lost / norm) ** 0.5 if norm else 0.0


def write_peft(
    directory: Path_,
    config: dict[str, Any],
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    error: float = 0.0,
    architecture: str | None = None,
    encoder_decoder: bool = False,
    vocabulary: int | None = None,
) -> PeftExport:
    """Write a folder that PEFT opens: adapter_config.json and adapter_model.safetensors.

    PEFT reads both, so they change together: over another LoRA the folder is made anew beside it, with its other files,
    and takes its place in one step (:mod:`flix.core.folders` says where a system cannot do that).

    Args:
        directory: the folder.
        config: PEFT's configuration.
        tensors: PEFT's tensors.
        error: what :func:`cut_to_rank` said.
        architecture: the base's class, for vLLM's rules.
        encoder_decoder: whether the base is an encoder-decoder.
        vocabulary: the size of its vocabulary.
    """
    from safetensors.numpy import save

    folder = Path(directory)
    contiguous = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    data = save(contiguous, metadata={"format": "pt"})
    _write(folder, (json.dumps(config, indent=2) + "\n").encode(), data)
    serving = check_vllm(
        config,
        {name: tensor.shape for name, tensor in tensors.items()},
        model=folder.resolve().name or "lora",
        folder=str(folder),
        base=config.get("base_model_name_or_path"),
        architecture=architecture,
        encoder_decoder=encoder_decoder,
        vocabulary=vocabulary,
    )
    layers = sum(name.endswith((".lora_A.weight", ".lora_embedding_A")) for name in tensors)
    return PeftExport(int(config["r"]), layers, error, serving)


def _write(folder: Path, config: bytes, tensors: bytes) -> None:
    """Write both files so that a reader, at any moment and after any crash, finds those of one version."""
    with alone(folder):
        sweep(folder, CONFIG_FILE, TENSOR_FILE)
        try:
            there = (folder / CONFIG_FILE).read_bytes()
        except OSError:
            there = None
        if there is None or there == config:
            # One rename makes the version: that of the configuration, without which it is no LoRA, or of the tensors.
            write_file(folder / TENSOR_FILE, tensors)
            if there is None:
                write_file(folder / CONFIG_FILE, config)
            return
    with whole_folder(folder, key=CONFIG_FILE) as aside:
        (aside / TENSOR_FILE).write_bytes(tensors)
        (aside / CONFIG_FILE).write_bytes(config)
