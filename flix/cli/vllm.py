"""What vLLM itself says of a LoRA, where it is installed.

``flix.core.peft.vllm`` holds a copy of vLLM's rules, so that an export can be judged on any machine. Here vLLM is
asked, so that the copy cannot grow old unseen: its ranks, and ``PEFTHelper.validate_legal`` (vllm/lora/peft_helper.py),
which every server runs before it loads a LoRA.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, get_args

from flix.core.peft.vllm import VLLM_RANKS, ServingReport


def ask_vllm(reports: Sequence[ServingReport]) -> list[str]:
    """Where vLLM does not say what flix's copy of its rules says; nothing where it is not installed.

    Args:
        reports: what was said of each LoRA, with its folder.
    """
    if importlib.util.find_spec("vllm") is None:
        return []
    try:
        found = _asked(reports)
    except Exception as error:  # a version that is made otherwise says nothing
        return [
            f"vLLM is installed but could not be asked ({type(error).__name__}: {error}); flix's "
            f"own rules apply"
        ]
    return found


def _asked(reports: Sequence[ServingReport]) -> list[str]:
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    said = []
    ranks = tuple(sorted(get_args(MaxLoRARanks)))
    if ranks != VLLM_RANKS:
        said.append(
            f"the installed vLLM takes the ranks {list(ranks)}, and flix knows of "
            f"{list(VLLM_RANKS)}: choose the smallest of vLLM's own that is enough"
        )
    for report in reports:
        problem = _problem(PEFTHelper, LoRAConfig, report)
        if problem and report.ok:
            said.append(f"the installed vLLM refuses {report.model}: {problem}")
    return said


def _problem(helper: Any, settings: Any, report: ServingReport) -> str | None:
    """Why vLLM refuses a LoRA, or None."""
    try:
        made = helper.from_local_dir(report.folder, None)
        made.validate_legal(
            settings(max_lora_rank=report.max_lora_rank or VLLM_RANKS[-1], max_loras=1)
        )
    except ValueError as error:
        return str(error)
    return None
