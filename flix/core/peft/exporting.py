"""A composition as one LoRA in PEFT's file format, exactly: pure, in numpy.

The names and rules are PEFT's (checked against 0.21): keys ``base_model.model.<path>.lora_A.weight``, embeddings
``lora_embedding_A``; one rank for all layers, since servers are reported to ignore ``rank_pattern``. Kernels with an
axis of E experts are ``target_parameters``: A ``[E r, d_in]``, expert by expert, and B ``[d_out, r E]``, rank by rank.
PEFT nests one wrapper for each such parameter of a module, the last one outermost, and names tensors by the nesting.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
        family: the older model whose files transformers reads for this one, too, by its type.
        kernels: the kernel's sizes of each layer that is a convolution.
        attentions: the modules whose kernels PEFT adapts as one, by the attention's path.
        unread: why PEFT would compute another update of a layer than it is, by its path.
    """

    target_modules: Sequence[str]
    architecture: str
    modules: Mapping[str, Mapping[str, NDArray[np.float32]]]
    fan_in_fan_out: bool = False
    base_model: str | None = None
    encoder_decoder: bool = False
    vocabulary: int | None = None
    family: str | None = None
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attentions: Collection[str] = ()
    unread: Mapping[str, str] = field(default_factory=dict)

    def check(self, layers: Collection[str]) -> None:
        """Refuse layers that PEFT would take for others.

        In files of older mixtures of experts each expert was a layer. PEFT reads such names as those of experts'
        kernels, also where a dense or shared layer of the model bears them.

        Raises:
            AdapterError: such names, or layers whose LoRA PEFT computes otherwise.
        """
        if self.unread:
            path, reason = next(iter(self.unread.items()))
            raise AdapterError(
                f"layer {path!r} {reason}: it would compute another update than flix; leave the layer out (exclude_modules), or use merge(model, row)"
            )
        taken = _EXPERTS_OF_OLD.get(self.family or "", ())
        if found := sorted({tail for path in layers if (tail := path.rpartition(".")[2]) in taken}):
            raise AdapterError(
                f"PEFT takes layers of {self.architecture} named {listed([repr(tail) for tail in found])} for its experts', as "
                "files of older versions had them, and would not read those that are adapted here (dense layers, shared "
                "experts); leave them out (exclude_modules), or use merge(model, row)"
            )

    @property
    def task_type(self) -> str | None:
        """PEFT's name of what the model's class is for; None where it has none."""
        tasks = (task for ending, task in _TASKS.items() if self.architecture.endswith(ending))
        return next(tasks, None)


# What PEFT (0.21) maps to the kernels of experts in models that transformers reads as these.
_EXPERTS_OF_OLD = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
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
    rank = max(a.shape[-2] for a, _ in pairs.values())
    tensors: dict[str, NDArray[np.float32]] = {}
    stems = _stems(adapter)
    for layer, (a, b) in pairs.items():
        missing, stem = rank - a.shape[-2], f"base_model.model.{stems.get(layer, layer)}"
        none = [(0, 0)] * (a.ndim - 2)
        a = np.pad(a, [*none, (0, missing), (0, 0)]).astype(np.float32)
        b = np.pad(b, [*none, (0, 0), (0, missing)]).astype(np.float32)
        if adapter.layers[layer].kind == "embedding":
            tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"] = a, b
        elif layer in stems:
            a, b = packed_experts(a, b)
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
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
        "target_modules": [
            path
            for path in (adapter.layers if target_modules is None else target_modules)
            if path not in stems
        ],
        "inference_mode": True,
    }
    if stems:
        config["target_parameters"] = list(stems)
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


def _stems(adapter: Adapter) -> dict[str, str]:
    """Under which path PEFT has the tensors of each kernel of experts.

    Raises:
        AdapterError: a kernel of one expert, which PEFT takes for a plain matrix.
    """
    by_module: dict[str, list[str]] = {}
    for path, shape in adapter.layers.items():
        if shape.experts == 1:
            raise AdapterError(
                f"layer {path!r} has an axis of experts with one expert, which PEFT does not read; merge(model, row) gives "
                "a plain model"
            )
        if shape.experts:
            by_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + ".base_layer" * depth
        for module, paths in by_module.items()
        for depth, path in enumerate(reversed(paths))
    }


def packed_experts(
    a: NDArray[np.floating], b: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """A ``[E, r, d_in]`` and B ``[E, d_out, r]`` as PEFT has them: ``[E r, d_in]`` and ``[d_out, r E]``."""
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def unpacked_experts(
    a: NDArray[np.floating], b: NDArray[np.floating], rank: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The way back from :func:`packed_experts`."""
    b = b.reshape(b.shape[0], rank, -1)
    return a.reshape(-1, rank, a.shape[-1]), b.transpose(2, 0, 1)


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
        many = a.shape[0] > int(config["r"])
        each = zip(*unpacked_experts(a, tensors[other], int(config["r"])), strict=True)
        pairs = []
        for one, two in each if many else [(a, tensors[other])]:
            first, second, values = nearest(one, two, rank)
            missing = rank - first.shape[0]  # a layer narrower than the rank
            first = np.pad(first, ((0, missing), (0, 0))).astype(np.float32)
            pairs.append((first, np.pad(second, ((0, 0), (0, missing))).astype(np.float32)))
            lost += float(np.sum(values[rank:] ** 2))
            norm += float(np.sum(values**2))
        sides = [np.stack(side) for side in zip(*pairs, strict=True)]
        cut[name], cut[other] = packed_experts(*sides) if many else (sides[0][0], sides[1][0])
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
