"""Whether vLLM serves a LoRA in PEFT's format, and with which flags: pure, from the file's own words.

Sources, in vLLM's repository as it was in 2026: ``vllm/lora/peft_helper.py`` (``validate_legal``: rank, bias,
modules_to_save, DoRA and kin; ``get_rank_and_scaling``), ``vllm/config/lora.py`` (the ranks),
``vllm/lora/lora_model.py`` and ``utils.py`` (a tensor's name must parse, the last component of its layer must be one of
the linear layers or declared embeddings of vLLM's own model class), ``vllm/lora/layers/logits_processor.py``
(vocabulary), and the tables ``docs/models/supported_models.md`` and ``docs/models/pooling_models/embed.md``, column
LoRA.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flix.core.errors import listed

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes."""

# The column LoRA of vLLM's tables. What is in neither set is left to the user to look up.
_SERVED_NAMES = """
ApertusForCausalLM ArceeForCausalLM BailingMoeForCausalLM CohereForCausalLM Cohere2ForCausalLM CwmForCausalLM
DeepseekForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Ernie4_5ForCausalLM ExaoneForCausalLM
Exaone4ForCausalLM FalconH1ForCausalLM GPTBigCodeForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
GlmForCausalLM Glm4ForCausalLM GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM InternLM2ForCausalLM
JambaForCausalLM Lfm2ForCausalLM LlamaForCausalLM MiniCPMForCausalLM MistralForCausalLM MixtralForCausalLM
NemotronForCausalLM OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM PhiForCausalLM Phi3ForCausalLM
Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
SolarForCausalLM Starcoder2ForCausalLM VaultGemmaForCausalLM
Gemma2Model Gemma3TextModel LlamaModel MistralModel Qwen2Model Qwen3Model
"""
_UNSERVED_NAMES = """
ArcticForCausalLM BloomForCausalLM DbrxForCausalLM FalconForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM
GPT2LMHeadModel GPT2ForSequenceClassification GPTJForCausalLM GPTNeoXForCausalLM Gemma3nForCausalLM
MPTForCausalLM Mamba2ForCausalLM MambaForCausalLM MptForCausalLM OPTForCausalLM OlmoeForCausalLM OrionForCausalLM
RWForCausalLM StableLmForCausalLM Zamba2ForCausalLM
BertModel BertForSequenceClassification BertForTokenClassification ModernBertModel NomicBertModel RobertaModel
RobertaForMaskedLM RobertaForSequenceClassification XLMRobertaModel XLMRobertaForSequenceClassification
"""
_SERVED, _UNSERVED = frozenset(_SERVED_NAMES.split()), frozenset(_UNSERVED_NAMES.split())
# Classes that declare their embedding and head as LoRA's (``embedding_modules``); Qwen's since #33234, 2026.
_WITH_EMBEDDINGS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "JambaForCausalLM"})
_WITH_EMBEDDINGS_LATELY = frozenset(
    {"Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}
)
_LARGEST_VOCABULARY = 257_024  # with an adapted head; 258,048 in the newest
_NAME = re.compile(
    r"base_model\.model\.(?P<path>.+?)(?:\.lora_[AB]\.weight|\.lora_embedding_(?P<embedding>[AB]))"
)
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MERGE = "merge the composition into the base (merge, flix merge) and serve that"


@dataclass(frozen=True)
class Problem:
    """A rule that a LoRA breaks.

    Attributes:
        rule: vLLM's rule.
        found: what the LoRA has.
        remedy: what to do.
    """

    rule: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"its rule is that {self.rule}; got {self.found}: {self.remedy}"


@dataclass(frozen=True)
class ServingReport:
    """Whether vLLM serves a LoRA.

    Attributes:
        problems: the rules that it breaks.
        notes: what could not be decided here.
        max_lora_rank: the least ``--max-lora-rank`` that takes it; None above the largest.
        model: the name that requests give as ``"model"``.
        folder: the LoRA's folder.
        base: the base model's folder or hub name, or None.
    """

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    max_lora_rank: int | None
    model: str
    folder: str
    base: str | None

    @property
    def ok(self) -> bool:
        """Whether it breaks none of the rules known here."""
        return not self.problems

    @property
    def flags(self) -> str:
        """The flags for ``vllm serve``; empty where no flag would help."""
        if self.problems:
            return ""
        module = shlex.quote(f"{self.model}={self.folder}")
        return f"--enable-lora --max-lora-rank {self.max_lora_rank} --lora-modules {module}"

    @property
    def command(self) -> str:
        """The whole command line; empty where vLLM would not serve it."""
        return f"vllm serve {shlex.quote(self.base or 'BASE')} {self.flags}" if self.ok else ""

    def __str__(self) -> str:
        if self.ok:
            lines = [f'to serve with vLLM: {self.command}; requests say "model": "{self.model}"']
        else:
            lines = [f"vLLM would not serve it: {problem}" for problem in self.problems]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "ok": self.ok,
            "problems": [vars(problem) for problem in self.problems],
            "notes": list(self.notes),
            "max_lora_rank": self.max_lora_rank,
            "flags": self.flags,
            "command": self.command,
            "model": self.model,
        }


def check_vllm(
    config: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    *,
    model: str = "lora",
    folder: str = "lora",
    base: str | None = None,
    architecture: str | None = None,
    encoder_decoder: bool = False,
    vocabulary: int | None = None,
) -> ServingReport:
    """Hold a LoRA to vLLM's rules.

    Args:
        config: PEFT's adapter_config.json.
        shapes: the shape of each tensor of adapter_model.safetensors, by name.
        model: the name under which vLLM is to serve it.
        folder: its folder.
        base: the base's folder or hub name.
        architecture: the base's class, e.g. ``"LlamaForCausalLM"``; None if it is not known.
        encoder_decoder: whether the base is an encoder-decoder.
        vocabulary: the size of the base's vocabulary.
    """
    problems = [*_setting_problems(config)]
    notes: list[str] = []
    whole = tuple(f"base_model.model.{path}." for path in config.get("modules_to_save") or ())
    if parameters := config.get("target_parameters"):
        modules = {path.rpartition(".")[0] for path in parameters}
        whole += tuple(f"base_model.model.{path}." for path in modules)
        problems.append(
            Problem(
                "a LoRA is one of layers (target_parameters is null): what vLLM makes of experts is not known here",
                listed(parameters, 3),
                _MERGE,
            )
        )
    layers, strangers = _layers({n: s for n, s in shapes.items() if not n.startswith(whole)})
    if strangers:
        problems.append(
            Problem(
                "tensors are named base_model.model.<layer>.lora_A.weight, .lora_B.weight, .lora_embedding_A or _B",
                listed(strangers, 3),
                "save the LoRA alone, as PEFT's save_pretrained does",
            )
        )
    rank = max([int(config.get("r", 8)), *(r for r, _ in layers.values())])
    needed = next((r for r in VLLM_RANKS if r >= rank), None)
    if needed is None:
        problems.append(
            Problem(
                f"the rank is at most {VLLM_RANKS[-1]}",
                str(rank),
                f"export with compress_to={VLLM_RANKS[-1]} (--compress-to), which says what it costs, or {_MERGE}",
            )
        )
    problems += _rank_problems(config, layers)
    found, more = _base_problems(architecture, encoder_decoder, base)
    problems += found
    notes += more
    if not found:
        found, more = _embedding_problems(architecture, shapes, layers, vocabulary)
        problems += found
        notes += more
    return ServingReport(tuple(problems), tuple(notes), needed, model, folder, base)


def _layers(
    shapes: Mapping[str, Sequence[int]],
) -> tuple[dict[str, tuple[int, bool]], list[str]]:
    """Rank of each layer, and whether it is an embedding; and the tensors that are of no layer."""
    layers: dict[str, tuple[int, bool]] = {}
    strangers = []
    for name, shape in shapes.items():
        match = _NAME.fullmatch(name)
        if match is None:
            strangers.append(name)
        elif name.endswith((".lora_A.weight", ".lora_embedding_A")):
            layers[match["path"]] = (int(shape[0]), match["embedding"] is not None)
    return layers, strangers


def _setting_problems(config: Mapping[str, Any]) -> list[Problem]:
    """What ``validate_legal`` refuses, the rank apart."""
    problems = []
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        what = "bias" if config.get("bias", "none") != "none" else "lora_bias"
        problems.append(
            Problem(
                "no biases are trained", f"{what}={config[what]!r}", f"train without, or {_MERGE}"
            )
        )
    if config.get("modules_to_save"):
        problems.append(
            Problem(
                "no whole modules come with a LoRA (modules_to_save is null)",
                listed(config["modules_to_save"]),
                f"adapt these layers instead of training them whole, or {_MERGE}",
            )
        )
    for name, what in (
        ("use_dora", "DoRA"),
        ("alora_invocation_tokens", "activated LoRA"),
        ("layer_replication", "repeated layers"),
        ("use_qalora", "QA-LoRA"),
        ("use_bdlora", "block-diagonal LoRA"),
    ):
        if config.get(name):
            problems.append(
                Problem(
                    "only plain LoRA is served", f"{name} ({what})", f"train without, or {_MERGE}"
                )
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        problems.append(
            Problem(
                "the base's kernels are those that PEFT started from",
                f"init_lora_weights={start!r}",
                "let PEFT convert it as it saves (path_initial_model_for_weight_conversion)",
            )
        )
    return problems


def _rank_problems(
    config: Mapping[str, Any], layers: Mapping[str, tuple[int, bool]]
) -> list[Problem]:
    """Only vLLM's newest versions read ``rank_pattern`` and ``alpha_pattern``; others scaled wrongly, silently."""
    problems = []
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            problems.append(
                Problem(
                    "all layers have one rank and one alpha (most versions ignore patterns, and scale wrongly)",
                    f"{name}={dict(config[name])!r}",
                    "import it and export it again: export_peft pads every layer to one rank",
                )
            )
    rank = config.get("r", 8)
    unlike = [path for path, (r, _) in layers.items() if r != rank]
    if unlike and not problems:
        problems.append(
            Problem(
                f"every layer has the configuration's rank, {rank}",
                f"{layers[unlike[0]][0]} in {unlike[0]}",
                "import it and export it again: export_peft pads every layer to one rank",
            )
        )
    return problems


def _base_problems(
    architecture: str | None, encoder_decoder: bool, base: str | None
) -> tuple[list[Problem], list[str]]:
    what = architecture or base or "the base"
    if encoder_decoder:
        problem = Problem(
            "the base is a decoder",
            f"the encoder-decoder {what}",
            "serve it with PEFT or transformers",
        )
        return [problem], []
    if architecture in _UNSERVED:
        problem = Problem("vLLM's class for the base takes LoRAs", what, _MERGE)
        return [problem], []
    if architecture not in _SERVED:
        note = f"whether vLLM takes LoRAs for {what} is not known here; see the column LoRA of its supported models"
        return [], [note]
    return [], []


def _embedding_problems(
    architecture: str | None,
    shapes: Mapping[str, Sequence[int]],
    layers: Mapping[str, tuple[int, bool]],
    vocabulary: int | None,
) -> tuple[list[Problem], list[str]]:
    """Embeddings and the head: only where vLLM's class declares them, under these names."""
    embeddings = [path for path, (_, embedding) in layers.items() if embedding]
    others = [path for path in embeddings if _tail(path) != "embed_tokens"]
    heads = [path for path in layers if _tail(path) == "lm_head"]
    problems = []
    rule = "besides linear layers, the token embedding and head that vLLM's class declares may be adapted"
    if others:
        problems.append(Problem(rule, listed(others), f"adapt linear layers alone, or {_MERGE}"))
    declared = [path for path in [*embeddings, *heads] if path not in others]
    notes = []
    if declared and architecture in _WITH_EMBEDDINGS_LATELY:
        notes.append(
            f"{listed(declared)}: vLLM's {architecture} takes these in versions of 2026 on"
        )
    elif declared and architecture in _SERVED and architecture not in _WITH_EMBEDDINGS:
        found = f"{listed(declared)} of {architecture}"
        problems.append(Problem(rule, found, f"adapt linear layers alone, or {_MERGE}"))
    elif declared and architecture not in _SERVED:
        notes.append(f"{listed(declared)}: served only if vLLM's class for the base declares them")
    for path in declared:
        tensor = f"base_model.model.{path}.lora_embedding_A"
        if vocabulary is not None and tensor in shapes and shapes[tensor][1] != vocabulary:
            problems.append(
                Problem(
                    "an embedding's LoRA covers the base's vocabulary exactly",
                    f"{shapes[tensor][1]} in {path}, {vocabulary} in the base",
                    "give the served base the same vocabulary",
                )
            )
    if heads and vocabulary is not None and vocabulary > _LARGEST_VOCABULARY:
        problems.append(
            Problem(
                f"with an adapted head the vocabulary is at most {_LARGEST_VOCABULARY:,}",
                f"{vocabulary:,}",
                f"adapt no head, or {_MERGE}",
            )
        )
    return problems, notes


def _tail(path: str) -> str:
    return path.rsplit(".", 1)[-1]
