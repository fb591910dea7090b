"""How many tokens a base has positions for, and tasks whose texts are cut there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flix.tasks.errors import ModelError
from flix.tasks.task import Task

_TABLES = ("position_embeddings", "embed_positions", "wpe")
_SOURCE, _TARGET = "training.max_source_tokens", "training.max_target_tokens"


def positions(model: Any) -> tuple[int | None, int | None]:
    """The tokens that a model, and the decoder of an encoder-decoder, have learned or fixed positions for.

    None for positions that are relative or computed, which have no end. What a table reserves is left out: RoBERTa's
    begins after the padding, BART's at an offset.
    """
    from torch import nn

    found: list[list[int]] = [[], []]
    decodes = bool(getattr(model.config, "is_encoder_decoder", False))
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _TABLES and isinstance(module, nn.Embedding):
            padding = -1 if module.padding_idx is None else module.padding_idx
            reserved = padding + 1 + int(getattr(module, "offset", 0))
            found[decodes and "decoder" in name.split(".")].append(module.num_embeddings - reserved)
    return min(found[0], default=None), min(found[1], default=None)


def within_positions(
    model: Any, tasks: Sequence[Task], asked: tuple[bool, bool]
) -> tuple[list[Task], list[str]]:
    """Tasks whose texts the base has positions for, and what to say of it.

    Args:
        model: the base.
        tasks: the tasks.
        asked: whether the lengths of source and target were asked for. Otherwise they are cut.

    Raises:
        ModelError: more was asked for than there is.
    """
    first, second = positions(model)
    found, notes = [], dict[str, None]()
    for task in tasks:
        if task.kind == "causal":
            source, target = _together(task, first, asked)
        else:
            source = _most(_SOURCE, task.max_source, first, asked[0])
            target = _most(_TARGET, task.max_target, second, asked[1])
        for key, had, has in (
            (_SOURCE, task.max_source, source),
            (_TARGET, task.max_target, target),
        ):
            if had != has:
                notes[f"the base has positions for {_said(first, second)}; {key} is {has} instead of {had}, longer texts are cut there"] = None  # fmt: skip
        found.append(replace(task, max_source=source, max_target=target))
    return found, [*notes]


def _most(key: str, length: int, room: int | None, asked: bool) -> int:
    if room is None or length <= room:
        return length
    if asked:
        raise ModelError(
            f"{key} is {length}, but the base has positions for {room} tokens alone; say {room} or less"
        )
    return room


def _together(task: Task, room: int | None, asked: tuple[bool, bool]) -> tuple[int, int]:
    """The lengths of what a causal model reads in one row."""
    source, target = task.max_source, task.max_target
    if room is None or source + target <= room:
        return source, target
    if not asked[1]:
        target = min(target, room - source if asked[0] else room // 2)
    if not asked[0]:
        source = min(source, room - target)
    if min(source, target) < 2 or source + target > room:
        raise ModelError(
            f"{_SOURCE} + {_TARGET} are {source + max(target, 2)}, but the base has positions for {room} tokens alone; together they "
            "are that many or less"
        )
    return source, target


def _said(first: int | None, second: int | None) -> str:
    if second is None or first == second:
        return f"{first} tokens"
    return (
        f"{second} tokens in its decoder"
        if first is None
        else f"{first} tokens, and {second} in its decoder"
    )
